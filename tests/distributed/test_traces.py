"""What a run leaves for those who look: artifacts for tlparse, ranges in a profile, progress in the log of rank 0."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest
import torch
from explained import Model
from worker_pool import WorkerPool

from spcompile.torch_private import trace_log

PoolOf = Callable[[int], WorkerPool]


class Keeping(logging.Handler):
    """Keeps records; of structured traces the artifacts of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.artifacts: dict[str, str] = {}
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        name = getattr(record, "metadata", {}).get("artifact", {}).get("name", "")
        if name.startswith("spcompile"):
            self.artifacts[name] = str(record.payload)  # type: ignore[attr-defined]
        elif record.name.startswith("spcompile"):
            self.messages.append(record.getMessage())


def step(is_traced: bool, is_profiled: bool) -> tuple[dict[str, str], list[str], list[str]]:
    """(Artifacts, names of ranges, messages of the log) of a step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = Model(2), torch.randint(0, 32, (1, 16))
    model.compile(backend="spcompile", options={"compiler": "eager", "attention": "ring"})
    kept, own = Keeping(), logging.getLogger("spcompile")
    level = own.level
    own.addHandler(kept)
    own.setLevel(logging.DEBUG)
    if is_traced:
        trace_log.addHandler(kept)
    try:
        if not is_profiled:
            model(ids).backward()
            return kept.artifacts, [], kept.messages
        with torch.profiler.profile() as profile:
            model(ids).backward()
        names = {event.name for event in profile.events() if event.name.startswith("spcompile::")}
        return kept.artifacts, sorted(names), kept.messages
    finally:
        trace_log.removeHandler(kept)
        own.removeHandler(kept)
        own.setLevel(level)


@pytest.mark.thinned(4)
def test_artifacts_of_every_rank(worker_pool: PoolOf) -> None:
    first, second = (found for found, _, _ in worker_pool(2).run(step, True, False))
    assert first.keys() == second.keys()
    assert {"spcompile_00_capture", "spcompile_plan", "spcompile_schedule_forward"} <= first.keys()
    by_pass = {name.split("_", 2)[2]: text for name, text in first.items() if name[10:12].isdigit()}
    assert "spx.attention" in by_pass["recognize-attention"]
    assert by_pass["recognize-attention_diff"].startswith("--- before")
    assert "recognize-softmax_diff" not in by_pass
    assert "spx.ring_attention(" in by_pass["forward"]
    assert "spx.ring_attention_backward(" in by_pass["backward"]
    plan = json.loads(first["spcompile_plan"])
    assert plan["mesh"] == {"cp": 2}
    assert plan["order"] == "zigzag"
    assert any(row["pass"] == "insert-reshards" and row["rewrites"] > 0 for row in plan["passes"])
    schedule = json.loads(first["spcompile_schedule_backward"])
    rings = [row for row in schedule["collectives"] if row["op"] == "ring_attention_backward"]
    assert len(rings) == 2
    assert all(int(row["bytes"]) > 0 and row["ms"] > 0 for row in rings)
    different = {name for name in first if first[name] != second[name]} - {"spcompile_plan"}  # which has times
    assert not different


@pytest.mark.thinned(11)
def test_ranges_name_the_op_and_its_layer(worker_pool: PoolOf) -> None:
    for artifacts, names, _ in worker_pool(2).run(step, False, True):
        assert not artifacts
        for layer in range(2):
            for op in ("ring_attention", "ring_attention_backward"):
                assert f"spcompile::{op}/layers.{layer}" in names
        assert any(name.startswith("spcompile::all_reduce") for name in names)
        assert any(name.startswith("spcompile::wait for all_reduce") for name in names)


@pytest.mark.thinned(3)
def test_progress_is_told_on_rank_0_only_and_decisions_on_all(worker_pool: PoolOf) -> None:
    messages = [found for _, _, found in worker_pool(2).run(step, False, False)]
    assert ["compiling: lower" in found for found in messages] == [True, False]
    for found in messages:
        assert any(message.startswith("parallelize-attention: 2 rewrites, ") for message in found)
        assert any(message.startswith("SPR203") for message in found)
