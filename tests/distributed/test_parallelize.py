"""parallelize on real processes: three steps of AdamW with clipping and accumulation, against the unsharded model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hf_models import build as build_hf
from oracle import ADAMW, EXACT, FLOAT32_INSIDE, default_dtype, error, own_loss
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
    shard_parameters: str | tuple[str, ...] | None = None
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
    outcomes = pool.run(compare, case)
    for rank, (errors, _) in enumerate(outcomes):
        bad = {name: e for name, e in errors.items() if not e <= tolerance}
        assert not bad, f"rank {rank}: {len(bad)} of {len(errors)} differ, as {dict(list(bad.items())[:6])}"
    return outcomes[0][1]


MESHES = {
    "tp": ({"tp": 2}, None),
    "cp": ({"cp": 2}, "cp"),
    "tp x cp": ({"tp": 2, "cp": 2}, "cp"),
    "tp at rest": ({"tp": 2}, "tp"),
    "tp and cp at rest": ({"tp": 2, "cp": 2}, ("cp", "tp")),
    "dp": ({"dp": 2}, "dp"),  # all ranks pass the same entries: the mean over them is that of one
}
MODELS_ON_MESHES = pytest.mark.parametrize(
    ("model", "mesh"),
    [*(("gpt-tiny", mesh) for mesh in MESHES), *(("llama-tiny", mesh) for mesh in ("tp", "cp", "tp x cp", "dp"))],
)


@pytest.mark.thinned(10)
@MODELS_ON_MESHES
def test_three_steps_give_the_parameters_of_the_plain_model(worker_pool: PoolOf, model: str, mesh: str) -> None:
    degrees, axis = MESHES[mesh]
    case = Training(partial(models.build, model), tokens, degrees, axis)
    world = 1
    for degree in degrees.values():
        world *= degree
    shapes = assert_trains(worker_pool(world), case)
    if model == "gpt-tiny":  # q, k and v in one weight, whose parts are not those of its heads
        rows, columns = {"tp at rest": (2, 1), "tp and cp at rest": (2, 2), "tp": (1, 1)}.get(mesh, (2, 1))
        assert shapes["blocks.0.attention.qkv.weight"] == (96 // rows, 32 // columns)


def hf_case(name: str, mesh: str) -> Training:
    inputs = partial(tokens, names=("input_ids", "labels"))
    return Training(partial(build_hf, name), inputs, *MESHES[mesh])


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_a_transformers_llama_trains_as_the_plain_one(worker_pool: PoolOf) -> None:
    shapes = assert_trains(worker_pool(4), hf_case("llama", "tp x cp"), FLOAT32_INSIDE)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (16, 16)


@pytest.mark.slow
@pytest.mark.thinned(18)
def test_gathered_by_inductor_too(worker_pool: PoolOf) -> None:
    case = Training(
        partial(models.build, "llama-tiny", layers=1), tokens, *MESHES["cp"], {"compiler": "inductor"}, steps=2
    )
    assert_trains(worker_pool(2), case)


@dataclass(frozen=True)
class OnMeta:
    """A model on meta, made by its own constructor."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    mesh: Mapping[str, int]
    shard_parameters: str | None = None
    tells_how: bool = True  # initialize= is given
    runs: bool = True  # it is called as well


def fill(case: OnMeta) -> tuple[dict[str, float], dict[str, int]]:
    """Errors of values, by name; bytes: of the whole model, of this rank's parts, and the most that was alive."""
    with default_dtype(torch.float64):
        mesh = init_device_mesh("cpu", tuple(case.mesh.values()), mesh_dim_names=tuple(case.mesh))
        mesh.get_group(next(iter(case.mesh)))
        torch.manual_seed(3)
        plain = case.build()
        after = torch.get_rng_state()
        with torch.device("meta"):
            model = case.build()
        torch.manual_seed(3)
        source: dict[str, Any] = {"initialize": case.build} if case.tells_how else {}
        model, peak = most_alive(
            lambda: spcompile.parallelize(
                model, mesh, case.inputs(0), shard_parameters=case.shard_parameters, compiler="eager", **source
            )
        )
        want, have = plain.state_dict(), model.state_dict()
        assert list(have) == list(want)
        errors = {name: error(want[name], whole(have[name])) for name in have}
        errors["random state"] = error(after, torch.get_rng_state())
        if case.runs:
            loss = own_loss(model(**case.inputs(0)))
            loss.backward()
            errors["loss"] = error(own_loss(plain(**case.inputs(0))).detach(), loss.detach())
        held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
        total = sum(p.numel() * p.element_size() for p in plain.parameters())
        largest = max(p.numel() * p.element_size() for p in plain.parameters())
        return errors, {"total": total, "held": held, "largest": largest, "peak": peak}


def most_alive(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` returns, and the most bytes of new tensors that were alive while it ran, from the CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = run()
    changes = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        alive += change.nbytes()
        most = max(most, alive)
    return result, most


def check_filled(pool: WorkerPool, case: OnMeta, loss: float = EXACT) -> list[dict[str, int]]:
    outcomes = pool.run(fill, case)
    for rank, (errors, _) in enumerate(outcomes):
        bad = {name: e for name, e in errors.items() if not e <= (loss if name == "loss" else 0.0)}
        assert not bad, f"rank {rank}: {bad}"
    return [sizes for _, sizes in outcomes]


@pytest.mark.thinned(30)
@MODELS_ON_MESHES
def test_a_model_on_meta_is_made_as_the_plain_model_is(worker_pool: PoolOf, model: str, mesh: str) -> None:
    degrees, axis = MESHES[mesh]
    check_filled(
        worker_pool(4 if len(degrees) == 2 else 2), OnMeta(partial(models.build, model), tokens, degrees, axis)
    )


@pytest.mark.slow
@pytest.mark.thinned(8)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_transformers_model_says_itself_how_it_is_made(worker_pool: PoolOf, model: str) -> None:
    inputs = partial(tokens, names=("input_ids", "labels"))
    case = OnMeta(partial(build_hf, model), inputs, {"tp": 2}, tells_how=False)
    check_filled(worker_pool(2), case, loss=FLOAT32_INSIDE)


def wide_llama() -> nn.Module:
    from spcompile.models.llama import LlamaConfig
    from spcompile.models.llama import build as build_llama

    return build_llama(LlamaConfig(vocab=64, layers=16, heads=4, kv_heads=2, dim=128, hidden=256))


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_no_rank_ever_holds_all_parameters(worker_pool: PoolOf) -> None:
    """Alive at once: slices of what is not cut yet, the parts, and the few parameters that are worked on."""
    case = OnMeta(wide_llama, tokens, {"cp": 4}, "cp", runs=False)
    for sizes in check_filled(worker_pool(4), case):
        assert sizes["held"] * 4 == sizes["total"]
        assert sizes["peak"] < 0.5 * sizes["total"], sizes
        assert sizes["peak"] < 2 * sizes["held"] + 6 * sizes["largest"], sizes
