"""A model that nobody holds any more is freed: what was compiled for it, which Dynamo keeps, keeps no tensor of it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from refusals import compiled
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

import spcompile
from spcompile.diagnostics import SpcompileError

PoolOf = Callable[[int], WorkerPool]
MODELS = 12  # of one program; where each compiles its own, 2


def one_life(axis: str, how: str, after: str, backend: str) -> list[weakref.ref[Any]]:
    """A model is built, trained for a step and dropped. Returns what it consisted of."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    model: Any = pm.ByHand()  # its mask is a buffer that is read
    words, answers = pm.ids(0, 12), pm.ids(1, 12)
    if backend != "spcompile":
        model.compile(backend=backend)
    elif how == "parallelize":
        split = {"shard_parameters": axis} if axis != "tp" else {}
        spcompile.parallelize(model, mesh, (words, answers), compiler="eager", **split)
    else:
        compiled(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = [weakref.ref(x) for x in (*model.parameters(), *model.buffers(), *model.modules())]
    model(words, answers).backward()
    optimizer.step()
    if after == "error":
        with contextlib.suppress(SpcompileError, torch._dynamo.exc.BackendCompilerFailed):
            model(words[:, : 5 + dist.get_rank()], answers[:, : 5 + dist.get_rank()])
    return parts


def alive_after(axis: str, how: str, after: str, backend: str = "spcompile") -> tuple[int, int]:
    count = MODELS if (how, after) == ("compile", "step") else 2
    parts = [part for _ in range(count) for part in one_life(axis, how, after, backend)]
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    return sum(part() is not None for part in parts), len(parts)


@pytest.mark.parametrize("axis", ["cp", "tp", "dp"])
@pytest.mark.parametrize(("how", "after"), [("compile", "step"), ("compile", "error"), ("parallelize", "step")])
@pytest.mark.thinned(30)
def test_no_model_outlives_its_user(worker_pool: PoolOf, axis: str, how: str, after: str) -> None:
    for alive, parts in worker_pool(2).run(alive_after, axis, how, after):
        assert alive == 0, f"of {parts}"


@pytest.mark.thinned(10)
def test_as_with_a_backend_of_torch(worker_pool: PoolOf) -> None:
    """The same lives, so that what is counted above is what it says."""
    assert {alive for alive, _ in worker_pool(2).run(alive_after, "cp", "compile", "step", "aot_eager")} == {0}


@pytest.mark.thinned(7)
def test_on_one_device() -> None:
    model = pm.ByHand()
    parts = [weakref.ref(x) for x in (*model.parameters(), *model.buffers(), *model.modules())]
    compiled(model)(pm.ids(0, 12), pm.ids(1, 12)).backward()
    del model
    gc.collect()
    assert [part() for part in parts if part() is not None] == []
