"""All-gathers of one group, many in flight at once, on gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import WorkerPool

from spcompile.collectives.gather_on_gloo import GATHER_ON_GLOO, gathers_on_gloo

c10d = torch.ops._c10d_functional


def gather_much(rounds: int, at_once: int) -> int:
    """How many of this rank's gathers gave anything but the parts of both."""
    group, world = dist.group.WORLD.group_name, dist.get_world_size()
    wrong = 0
    for turn in range(rounds):
        parts = [torch.full((3, 2), 1000.0 * turn + 10 * i + dist.get_rank()) for i in range(at_once)]
        flying = [GATHER_ON_GLOO(part, world, group) for part in parts]
        for part in parts:
            part.fill_(torch.nan)  # sent already
        for i, result in enumerate(flying):
            want = [torch.full((3, 2), 1000.0 * turn + 10 * i + rank) for rank in range(world)]
            wrong += not torch.equal(c10d.wait_tensor(result), torch.cat(want))
    return wrong


@pytest.mark.thinned(10)
def test_many_in_flight(worker_pool: Callable[[int], WorkerPool]) -> None:
    assert worker_pool(2).run(gather_much, 300, 4) == [0, 0]


def plain(x: Tensor) -> Any:
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "0")) + c10d.wait_tensor(c10d.all_reduce(x, "sum", "0"))


def test_only_gathers_are_replaced() -> None:
    gm = torch.fx.symbolic_trace(plain)
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverloadPacket):
            node.target = node.target.default
    assert gathers_on_gloo(gm.graph) == 1
    targets = [node.target for node in gm.graph.find_nodes(op="call_function", target=GATHER_ON_GLOO)]
    assert targets == [GATHER_ON_GLOO]
    assert gathers_on_gloo(gm.graph) == 0


@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_shape_of_fakes(shape: tuple[int, ...]) -> None:
    meta = torch.empty(shape, device="meta")
    assert GATHER_ON_GLOO(meta, 4, "0").shape == (4 * shape[0], *shape[1:])
