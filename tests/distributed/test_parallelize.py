"""parallelize on real processes: three steps of AdamW with clipping and accumulation, against the unsharded model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from oracle import ADAMW, EXACT, default_dtype, error, own_loss
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile
from spcompile import models

PoolOf = Callable[[int], WorkerPool]


def tokens(number: int, *, length: int = 32, names: tuple[str, str] = ("ids_BS", "labels_BS")) -> dict[str, Tensor]:
    """Token ids and the same as labels."""
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, 64, (2, length), generator=generator)
    return {names[0]: ids_BS, names[1]: ids_BS.clone()}


@dataclass(frozen=True)
class Training:
    """A model, a mesh, and how its parameters are sharded."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    mesh: Mapping[str, int]
    shard_parameters: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 3


def train(model: nn.Module, case: Training) -> list[Tensor]:
    """Losses and norms of steps of AdamW with gradients of two micro-batches, clipped; leaves the last gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    seen = []
    for step in range(case.steps):
        optimizer.zero_grad()
        for micro_batch in range(2):
            loss = own_loss(model(**case.inputs(2 * step + micro_batch))) / 2
            loss.backward()
            seen.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        seen.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
    return seen


def whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(case: Training) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
    """One rank's errors by name, and the local shape of every parameter."""
    with default_dtype(torch.float64):
        plain = case.build()
        mesh = init_device_mesh("cpu", tuple(case.mesh.values()), mesh_dim_names=tuple(case.mesh))
        sharded = copy.deepcopy(plain)
        names = [name for name, _ in sharded.named_parameters()]
        options = {"compiler": "eager", **case.options}
        sharded = spcompile.parallelize(
            sharded, mesh, case.inputs(0), shard_parameters=case.shard_parameters, **options
        )
        assert [name for name, _ in sharded.named_parameters()] == names
        assert list(sharded.state_dict()) == list(plain.state_dict())
        want, have = train(plain, case), train(sharded, case)
        errors = {f"loss or norm {i}": error(w, h) for i, (w, h) in enumerate(zip(want, have, strict=True))}
        shapes = {}
        for (name, p), (_, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
            assert isinstance(q, DTensor)
            assert isinstance(q.grad, DTensor)
            assert q.grad.placements == q.placements
            errors[f"gradient of {name}"] = error(p.grad, whole(q.grad), 1e-3)
            errors[name] = error(p.detach(), whole(q.detach()))
            shapes[name] = tuple(q.to_local().shape)
        return errors, shapes


def assert_trains(pool: WorkerPool, case: Training, tolerance: float = EXACT) -> dict[str, tuple[int, ...]]:
    for rank, (errors, shapes) in enumerate(pool.run(compare, case)):
        bad = {name: e for name, e in errors.items() if not e <= tolerance}
        assert not bad, f"rank {rank}: {len(bad)} of {len(errors)} differ, as {dict(list(bad.items())[:6])}"
    return shapes


MESHES = {
    "tp": ({"tp": 2}, None),
    "cp": ({"cp": 2}, "cp"),
    "tp x cp": ({"tp": 2, "cp": 2}, "cp"),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["llama-tiny", "gpt-tiny"])
def test_three_steps_give_the_parameters_of_the_plain_model(worker_pool: PoolOf, model: str, mesh: str) -> None:
    degrees, axis = MESHES[mesh]
    case = Training(partial(models.build, model), tokens, degrees, axis)
    world = 1
    for degree in degrees.values():
        world *= degree
    assert_trains(worker_pool(world), case)
