"""Groups of their own for messages and gradients on real processes, also where a mesh is over a part of the world."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import plain_models as pm
import pytest
import torch.distributed as dist
from oracle import EXACT, Case, compare
from torch.distributed.device_mesh import DeviceMesh
from worker_pool import WorkerPool

from spcompile.machine.mesh import RuntimeMesh

PoolOf = Callable[[int], WorkerPool]


def groups_asked_for(ranks: list[int], case: Case) -> tuple[list[str], list[list[int]], float] | None:
    """What the ranks of a mesh ask for, the members of what they get, and the largest error; None on others."""
    device_mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("cp",))
    if dist.get_rank() not in ranks:
        return None
    asked: dict[str, str] = {}
    group_name = RuntimeMesh.group_name

    def noted(self: RuntimeMesh, axis: str) -> str:
        asked[axis] = group_name(self, axis)
        return asked[axis]

    with mock.patch.object(RuntimeMesh, "group_name", noted):
        found = compare(Case(case.build, case.inputs, options={**case.options, "mesh": device_mesh}))
    members = [dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(x)) for x in asked.values()]
    assert len(set(asked.values())) == len(asked)
    return list(asked), members, max(found.errors.values())


@pytest.mark.thinned(4)
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [1, 2]], ids=["all ranks", "two of four"])
def test_each_channel_has_a_group_of_the_ranks_of_its_axis(worker_pool: PoolOf, ranks: list[int]) -> None:
    case = Case(pm.Scored, partial(pm.sequence_first, length=17), options={"attention": "ring"})
    outcomes: list[Any] = worker_pool(4).run(groups_asked_for, ranks, case)
    inside = [outcome for rank, outcome in enumerate(outcomes) if rank in ranks]
    assert all(outcome is None for rank, outcome in enumerate(outcomes) if rank not in ranks)
    for names, members, error in inside:
        assert {"cp", "cp/messages", "cp/gradients"} <= set(names)
        assert names == inside[0][0]  # in one order
        assert members == [ranks] * len(names)
        assert error <= EXACT
