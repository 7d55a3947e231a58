"""Groups of their own for messages and gradients on real processes, also where a mesh is over a part of the world."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from oracle import EXACT, Case, compare
from torch.distributed.device_mesh import DeviceMesh
from worker_pool import WorkerPool

from spcompile.machine.mesh import MeshShape, RuntimeMesh

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


@pytest.mark.thinned(13)
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


def named_after_different_pasts(channel: str) -> tuple[str, float]:
    """The group of a channel among four ranks, of which the first belongs to one group more than the others."""
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    mesh = RuntimeMesh(MeshShape((("cp", 4),)), DeviceMesh("cpu", [0, 1, 2, 3], mesh_dim_names=("cp",)))
    name = mesh.group_name(channel)
    ones = torch.ones(1)
    dist.all_reduce(ones, group=dist.distributed_c10d._resolve_process_group(name))
    return name, float(ones)


@pytest.mark.parametrize("axis", ["cp.inner2", "cp/messages"])
def test_ranks_that_are_in_different_numbers_of_groups_meet(worker_pool: PoolOf, axis: str) -> None:
    found = worker_pool(4).run(named_after_different_pasts, axis, timeout=100.0)
    assert [count for _, count in found] == [4.0 if axis == "cp/messages" else 2.0] * 4
