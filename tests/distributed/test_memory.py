"""Option `memory` on real processes: what autograd saves is what the plan says, and gradients stay what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

import spcompile
from spcompile import models
from spcompile.memory.account import saved_bytes
from spcompile.program.observed import observed
from spcompile.schedule.saved_bytes import saved_activation_bytes

LENGTH = 257
Outcome = tuple[int, int, float]  # bytes saved, bytes planned, the largest error of a gradient


def least(axis: str, shard: bool) -> Outcome:
    """Of one rank with memory="min"."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    ids_BS = torch.randint(0, 16, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = models.build("llama-tiny", vocab=16).double()
    plain(ids_BS, ids_BS).backward()
    model = copy.deepcopy(plain)
    model.zero_grad()
    options = {"compiler": "eager", "memory": "min", "host_memory": 0, "outputs": "loss"}
    if shard:
        spcompile.parallelize(model, mesh, (ids_BS, ids_BS), shard_parameters=axis, **options)
    else:
        model.compile(backend="spcompile", options={"mesh": mesh, **options})
    with observed() as programs:
        model(ids_BS, ids_BS).backward()
    errors = [
        float((whole(p.grad) - whole(q.grad)).abs().max() / whole(q.grad).abs().max())
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    (_, emission) = programs[-1]
    assert emission.memory is not None
    assert emission.memory.trades
    saved = saved_activation_bytes(model, lambda: model(ids_BS, ids_BS)) - ids_BS.nbytes
    return saved, int(saved_bytes(emission.graphs)), max(errors)


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    full = getattr(x, "full_tensor", None)
    return full() if full is not None else x


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("axis", ["cp", "tp"])
@pytest.mark.thinned(30)
def test_two_ranks(worker_pool: Callable[[int], WorkerPool], axis: str, shard: bool) -> None:
    for saved, planned, error in worker_pool(2).run(least, axis, shard):
        assert saved == planned
        assert error < 1e-10
