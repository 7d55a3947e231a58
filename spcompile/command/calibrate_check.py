"""Predicted step times beside measured ones, of a small model in several ways, on the machine that was calibrated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import spcompile
from spcompile.command.model_spec import built_with_inputs
from spcompile.command.train import join_processes, on_processes
from spcompile.machine.durations import ms_text
from spcompile.machine.host import cores

MODEL, SETTINGS = "models:llama", {"layers": 2, "dim": 512, "hidden": 1536, "heads": 8, "kv_heads": 4}
_STEPS = 5


@dataclass(frozen=True)
class Way:
    """One configuration. It runs call by call: what Inductor fuses on a CPU is no matter of this machine's figures."""

    name: str
    axis: str
    seq: int
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Any]:
        """Options of the backend."""
        return {"compiler": "eager", "outputs": "loss", **self.options}


WAYS_CHECKED = (
    Way("cp, ring, 1k", "cp", 1024, options={"attention": "ring"}),
    Way("cp, ring, 2k", "cp", 2048, options={"attention": "ring"}),
    Way("cp, Ulysses, 1k", "cp", 1024, options={"attention": "ulysses"}),
    Way("tp, 1k", "tp", 1024),
    Way("tp, plain Megatron, 1k", "tp", 1024, options={"passes": {"split-all-reduce": False}}),
    Way("dp, 1k", "dp", 1024, 2),
)


@dataclass(frozen=True)
class CheckedRow:
    """Seconds of a step without the optimizer."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def checked_rows(accelerator: str, ranks: int, ways: Sequence[Way] = WAYS_CHECKED) -> list[CheckedRow]:
    """Measured in one run of so many processes."""
    measured = on_processes(ranks, measure_ways, ways)[0]
    return [CheckedRow(way.name, _predicted(way, accelerator, ranks), measured[way.name]) for way in ways]


def _predicted(way: Way, accelerator: str, ranks: int) -> float:
    entries = way.batch // (ranks if way.axis == "dp" else 1)
    built, inputs = built_with_inputs(MODEL, way.seq, max(1, entries), "float32", "meta", SETTINGS)
    plan = spcompile.explain(built, inputs, {way.axis: ranks}, accelerator=accelerator, **way.given)
    return plan.predicted.total("seconds")


def measure_ways(ways: Sequence[Way]) -> dict[str, float]:
    """In processes of `on_processes`: of each way the median of a few steps of the slowest rank."""
    with join_processes() as device:
        if device == "cpu":
            torch.set_num_threads(max(1, cores() // dist.get_world_size()))
        return {way.name: _step_seconds(way, device) for way in ways}


def _step_seconds(way: Way, device: str) -> float:
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    entries = max(1, way.batch // (ranks if way.axis == "dp" else 1))
    model, inputs = built_with_inputs(MODEL, way.seq, entries, "float32", device, SETTINGS)
    options: dict[str, Any] = {"mesh": {way.axis: ranks}, **way.given}
    compiled = torch.compile(model, backend="spcompile", options=options)
    found = []
    for _ in range(_STEPS + 1):
        dist.barrier()
        start = time.perf_counter()
        loss = compiled(**inputs)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        model.zero_grad()
    slowest = torch.tensor(found[1:], device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def check_text(rows: Sequence[CheckedRow]) -> str:
    """One line a row, and the worst."""
    lines = [
        f"{row.name:<26} predicted {ms_text(row.predicted)} ms, measured {ms_text(row.measured)} ms, {row.error:+.0%}"
        for row in rows
    ]
    worst = max(abs(row.error) for row in rows)
    return "\n".join([*lines, f"worst {worst:.0%}"])
