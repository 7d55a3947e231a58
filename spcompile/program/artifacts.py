"""What a compile leaves in TORCH_TRACE, from where `tlparse` shows it: graphs after each pass, the plan, the schedule.

Every rank writes to its own file, so that ranks can be compared. Nothing is made where nothing is traced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch.fx as fx

from spcompile.graph.printer import unified_diff
from spcompile.memory.planner import MemoryPlan
from spcompile.passes_api import Context
from spcompile.program.log_texts import is_traced
from spcompile.program.pipeline import Snapshot
from spcompile.schedule.communication import sends_of
from spcompile.schedule.op_cost import cost_model
from spcompile.schedule.timeline import COMPUTE, HOST, WAITS, predict, records_of
from spcompile.torch_private import trace_structured

_FINAL = ("forward", "backward", "inference")


class Artifacts:
    """The artifacts of one compile, numbered in the order of its passes."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._passes: list[dict[str, Any]] = []

    def snapshot(self, snapshot: Snapshot) -> None:
        """`spcompile_<number>_<pass>`: the graph after a pass; `..._diff`, where it changed something."""
        name = f"spcompile_{len(self._texts):02d}_{snapshot.name}"
        _trace(name, "string", lambda: snapshot.text)
        if self._texts and snapshot.report.rewrites and snapshot.name not in _FINAL:
            _trace(f"{name}_diff", "string", lambda: unified_diff(self._texts[-1], snapshot.text))
        self._texts.append(snapshot.text)
        report = snapshot.report
        self._passes.append({"pass": snapshot.name, "rewrites": report.rewrites, "ms": round(report.milliseconds, 3)})

    def plan(self, ctx: Context, memory: MemoryPlan | None) -> None:
        """`spcompile_plan`: what was decided, as JSON."""
        found: dict[str, Any] = {
            "mesh": dict(ctx.mesh.axes),
            "options": ctx.options.compared(),
            "order": ctx.order,
            "passes": self._passes,
            "remarks": [remark.to_dict() for remark in ctx.remarks.rows],
        }
        if memory is not None:
            found["memory"] = {"total": memory.total, "limit": memory.limit, "made_again": len(memory.trades)}
        _trace("spcompile_plan", "json", lambda: json.dumps(found, default=str))

    def schedule(self, phase: str, gm: fx.GraphModule, ctx: Context) -> None:
        """`spcompile_schedule_<phase>`: predicted totals, and every collective in the order of their starts."""
        _trace(f"spcompile_schedule_{phase}", "json", lambda: json.dumps(_schedule(phase, gm, ctx), default=str))


def _schedule(phase: str, gm: fx.GraphModule, ctx: Context) -> dict[str, Any]:
    cost = cost_model(ctx.mesh, ctx.options)
    (row,) = predict({phase: gm}, cost).phases
    events = records_of({phase: gm}, cost)[phase].events
    times = {event.node: event for event in events if event.stream not in (COMPUTE, HOST, WAITS)}
    collectives = []
    for send in sends_of(gm, ctx.mesh):
        event = times.get(send.node)
        when = {"start_ms": 1e3 * event.start, "ms": 1e3 * event.seconds} if event is not None else {}
        sent = {"node": send.node, "op": send.op, "axis": send.axis, "bytes": str(send.bytes), "layer": send.layer}
        collectives.append({**sent, **when})
    return {"ms": 1e3 * row.seconds, "exposed_ms": 1e3 * row.exposed, "collectives": collectives}


def own_artifacts() -> Artifacts | None:
    """For one compile; None where TORCH_TRACE is not set."""
    return Artifacts() if is_traced() else None


def from_cache(remarks: list[str]) -> None:
    """Of a program that was found finished: no pass has run."""
    if is_traced():
        _trace(
            "spcompile_from_cache",
            "string",
            lambda: "\n".join(["a finished program was found; no pass has run", *remarks]),
        )


def _trace(name: str, encoding: str, text: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=text)
