"""A plain model trained as torchtitan's Trainer does it, in one process and over a mesh.

torchtitan is not installed here: a stand-in has what its Trainer hands to `parallelize_fn`, and takes its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import ADAMW, FLOAT32, compare_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from worker_pool import WorkerPool

from spcompile import models
from spcompile.diagnostics import SpcompileError
from spcompile.integrations.torchtitan import parallelize_over

PoolOf = Callable[[int], WorkerPool]


@dataclass
class ParallelDims:
    """The names of torchtitan's."""

    tp: int
    world_size: int
    cp: int = 1
    dp_shard: int = 1
    dp_replicate: int = 1
    pp: int = 1
    ep: int = 1

    def get_mesh(self, name: str) -> Any:
        return init_device_mesh("cpu", (self.dp_shard, self.tp), mesh_dim_names=("fsdp", "tp"))[name]


@dataclass
class CompileConfig:
    enable: bool = False
    components: list[str] = field(default_factory=lambda: ["model", "loss"])


@dataclass
class ActivationCheckpointConfig:
    mode: str = "none"


CONFIGS = {"compile_config": CompileConfig(), "ac_config": ActivationCheckpointConfig(), "dump_folder": ""}


def trained(parallelize: Callable[..., Any] | None, data: int = 1) -> dict[str, torch.Tensor]:
    """Parameters and losses of three steps. The model is made on `meta`, and its loss is outside of it.

    data: of torchtitan's ranks that have different rows.
    """
    with torch.device("meta"):
        model = models.build("llama-tiny", layers=2)
    own = slice(None)
    if parallelize is not None:
        dims = ParallelDims(dist.get_world_size() // data, dist.get_world_size(), dp_shard=data)
        place = dims.get_mesh("fsdp").get_local_rank()
        own = slice(2 // data * place, 2 // data * (place + 1))
        model = parallelize(model, parallel_dims=dims, **CONFIGS)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            whole = 0.1 * torch.randn(value.shape)
            value.copy_(distribute(whole, value))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    found = {}
    for at in range(3):
        ids_BS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(at))
        logits = model(ids_BS[own])
        targets = ids_BS[own, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        (loss / ids_BS[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {at}"] = loss.detach()
        if data > 1:
            dist.all_reduce(found[f"loss {at}"], group=dims.get_mesh("fsdp").get_group())
    whole_of = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return found | {name: p.detach() for name, p in whole_of.items()}


def distribute(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """On CPU a DTensor would draw other random numbers than one process does."""
    return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole


def errors_over(mesh: dict[str, int] | None, data: int) -> dict[str, float]:
    torch._dynamo.reset()
    want, have = trained(None), trained(parallelize_over(mesh, compiler="eager"), data)
    return compare_tensors(want, have)


@pytest.mark.slow
@pytest.mark.thinned(6)
@pytest.mark.parametrize(("mesh", "data"), [(None, 1), ({"tp": 2}, 1), ({"cp": 2}, 2)], ids=str)
def test_as_in_one_process(worker_pool: PoolOf, mesh: dict[str, int] | None, data: int) -> None:
    for errors in worker_pool(2 * data).run(errors_over, mesh, data):
        assert {name: error for name, error in errors.items() if not error <= FLOAT32} == {}


@pytest.mark.parametrize(
    ("dims", "configs", "text"),
    [
        ({"cp": 2}, {}, "torchtitan's cp = 2"),
        ({"dp_replicate": 2}, {}, "torchtitan's dp_replicate = 2"),
        ({"world_size": 4}, {}, "tensor_parallel_degree 2 of 4 processes"),
        ({}, {"compile_config": CompileConfig(enable=True)}, "compile.components"),
        ({}, {"ac_config": ActivationCheckpointConfig("full")}, "activation_checkpoint.mode='full'"),
    ],
)
def test_what_is_refused(dims: dict[str, int], configs: dict[str, Any], text: str) -> None:
    given = ParallelDims(**{"tp": 2, "world_size": 2, **dims})
    with pytest.raises(SpcompileError, match=text):
        parallelize_over({"cp": 2})(torch.nn.Linear(2, 2), parallel_dims=given, **CONFIGS | configs)


@pytest.mark.parametrize(("mesh", "options"), [({"xp": 2}, {}), (None, {"attention": "rign"})])
def test_illegal_words_are_told_at_once(mesh: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SpcompileError):
        parallelize_over(mesh, **options)
