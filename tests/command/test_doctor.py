"""`spcompile doctor`: what is missing is a note with a cure, what is wrong is an exit status of 1."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from worker_pool import WorkerPool

from spcompile.collectives import COLLECTIVES
from spcompile.command import doctor, doctor_ranks
from spcompile.command.doctor_ranks import CollectiveCheck, RanksFound

GOOD = RanksFound(
    "gloo", "cpu", ["a", "a"], ["torch 2.13", "torch 2.13"], 0.001, [CollectiveCheck("ring", 1, 0.1, None)]
)


def test_this_machine_has_what_the_tests_need() -> None:
    found = {one.name: one for one in doctor.findings()}
    assert {"python", "spcompile", "torch", "cpu", "gloo"} <= set(found)
    assert all(one.ok is not False for one in found.values())
    assert all(one.cure for one in found.values() if one.ok is None and one.section != "communication")
    json.dumps(doctor.as_dicts(list(found.values())))


def test_what_ranks_differ_in_is_wrong() -> None:
    assert all(one.ok for one in doctor.findings_of_ranks(GOOD))
    others = replace(GOOD, versions=["torch 2.13", "torch 2.12"], clock_seconds=2.0)
    found = {one.name: one for one in doctor.findings_of_ranks(others)}
    assert found["versions"].ok is False
    assert "1: torch 2.12" in found["versions"].found
    assert found["clocks"].ok is None
    wrong = replace(GOOD, checks=[CollectiveCheck("ring", 1, 0.1, "rank 1: 1 of 1 results are wrong")])
    lines = list(doctor.lines_of(list(doctor.findings_of_ranks(wrong))))
    assert any(line.split()[:2] == ["WRONG", "ring"] and "NCCL_DEBUG" in line for line in lines)


def found_by(breaks: bool) -> Any:
    """On one rank; where it breaks, rank 1's shift of a ring is another one."""
    if breaks and dist.get_rank() == 1:
        right = doctor_ranks._numbers
        doctor_ranks._numbers = lambda *args: right(*args) + 1
        try:
            return doctor_ranks.found_by_ranks("cpu")
        finally:
            doctor_ranks._numbers = right
    return doctor_ranks.found_by_ranks("cpu")


@pytest.mark.parametrize("breaks", [False, True])
def test_every_collective_is_checked_on_two_ranks(worker_pool: Any, breaks: bool) -> None:
    pool: WorkerPool = worker_pool(2)
    first, second = pool.run(found_by, breaks)
    assert [check.wrong for check in first.checks] == [check.wrong for check in second.checks]
    assert {check.name for check in first.checks} == {*(c.name for c in COLLECTIVES.values()), "ring"}
    assert any(check.wrong for check in first.checks) is breaks
    assert first.clock_seconds < 60
