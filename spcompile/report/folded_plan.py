"""The plan of a model whose equal layers were compiled as a few of them: what two such plans say, continued.

Equal layers take equally much, so what is counted, saved, sent and computed grows by the same with each. That is exact.
Peaks and times are continued as well, and differ from those of a full compile by a few percent at most: what stands at
an edge of a bundle of gradients is not the same at every depth, nor is the number of bundles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy

from spcompile.diagnostics import Remark
from spcompile.memory.account import Memory, PhaseMemory
from spcompile.memory.largest import LargeTensor
from spcompile.passes_api import Stage
from spcompile.report.line_of_depths import Line, NotAlike
from spcompile.report.plan import Folded, PassRow, Plan
from spcompile.schedule.communication import Row
from spcompile.schedule.timeline import Prediction

SCHEDULE = Stage.SCHEDULE.value


def folded_plan(few: Plan, more: Plan, folded: Folded) -> Plan | None:
    """Of a model with all equal layers, from plans with the two numbers of them that were compiled.

    None where the two do not say the same of their layers, or already make values again to fit.
    """
    if few.memory.actions or more.memory.actions or few.parts or more.parts:
        return None
    try:
        return _continued(few, more, folded)
    except NotAlike:
        return None


def _continued(few: Plan, more: Plan, folded: Folded) -> Plan:
    line = folded.line
    a, b = few.sharding, more.sharding
    sharding = replace(b, sharded_ops=line.at(a.sharded_ops, b.sharded_ops), ops=line.at(a.ops, b.ops))
    answers = replace(
        more.answers,
        flops=line.at(few.answers.flops, more.answers.flops),
        flops_full=line.at(few.answers.flops_full, more.answers.flops_full),
    )
    return replace(
        more,
        sharding=sharding,
        answers=answers,
        attention=line.rows(few.attention, more.attention, lambda r: replace(r, count=0), ["count"]),
        collectives=line.rows(
            bundled(few.collectives),
            bundled(more.collectives),
            lambda r: replace(r, count=0, bytes=sympy.S.Zero),
            ["count", "bytes"],
        ),
        memory=_continued_memory(few.memory, more.memory, line),
        remarks=_continued_remarks(few.remarks, more.remarks, line),
        passes=[
            *line.rows(_before_schedule(few), _before_schedule(more), lambda r: (r.name, r.phase), ["rewrites"]),
            *(row for row in more.passes if row.stage == SCHEDULE),
        ],
        largest_tensors=_continued_tensors(few.largest_tensors, more.largest_tensors, line),
        predicted=_continued_times(few.predicted, more.predicted, line),
        folded=folded,
    )


def _before_schedule(plan: Plan) -> list[PassRow]:
    """What passes move on the final graphs grows with nothing: their rows stay those of the second program."""
    return [row for row in plan.passes if row.stage != SCHEDULE]


def bundled(rows: Iterable[Row]) -> list[Row]:
    """What is sent for parameters as one row: which layers share a message is not the same at each depth."""
    found: dict[Row, Row] = {}
    for row in rows:
        key = replace(row, count=0, bytes=sympy.S.Zero)
        if row.origin.startswith("parameter"):
            key = replace(key, layer="", source=None)
        before = found.get(key, key)
        found[key] = replace(before, count=before.count + row.count, bytes=before.bytes + row.bytes)
    return list(found.values())


def _continued_tensors(few: Sequence[LargeTensor], more: Sequence[LargeTensor], line: Line) -> list[LargeTensor]:
    """Bundles of parameters have other sizes at each depth: what the first has no equal of stays as it is."""

    def counted(rows: Sequence[LargeTensor]) -> dict[tuple[Any, ...], LargeTensor]:
        seen: Counter[tuple[Any, ...]] = Counter()
        found = {}
        for row in rows:
            key = (row.phase, row.shape, row.dtype, row.source, row.op)
            found[(*key, seen[key])] = row
            seen[key] += 1
        return found

    before = counted(few)
    return [
        replace(row, count=line.at(before[key].count, row.count)) if key in before else row
        for key, row in counted(more).items()
    ]


def _continued_remarks(few: Sequence[Remark], more: Sequence[Remark], line: Line) -> list[Remark]:
    """Raises NotAlike where one depth has a remark that the other has not."""
    before = {(remark.code, remark.text, remark.where): remark for remark in few}
    if [*before] != [(remark.code, remark.text, remark.where) for remark in more]:
        raise NotAlike
    found = []
    for earlier, remark in zip(before.values(), more, strict=True):
        times = line.at(len(earlier.values), len(remark.values))
        found.append(replace(remark, without_name=times - len(remark.values)))
    return found


def _continued_memory(few: Memory, more: Memory, line: Line) -> Memory:
    same = ("host_limit_bytes", "budget_bytes", "fits", "peak_at", "actions", "phases")
    sizes = {name: line.at(getattr(few, name), value) for name, value in vars(more).items() if name not in same}
    phases = tuple(
        PhaseMemory(b.phase, line.at(a.kept, b.kept), line.at(a.transient, b.transient), b.where)
        for a, b in zip(few.phases, more.phases, strict=True)
    )
    high = max(phases, key=lambda phase: float(phase.kept + phase.transient))
    sizes["peak_bytes"] = sizes["parameter_bytes"] + high.kept + high.transient
    sizes["total_bytes"] = sizes["peak_bytes"] + sizes["optimizer_bytes"]
    sizes["transient_bytes"] = high.transient
    fits = more.budget_bytes is None or bool(sizes["total_bytes"] <= more.budget_bytes)
    return replace(more, **sizes, phases=phases, peak_at=high.where, fits=fits)


def _continued_times(few: Prediction, more: Prediction, line: Line) -> Prediction:
    names = [name for name in vars(more.phases[0]) if name != "phase"]
    return Prediction(tuple(line.rows(few.phases, more.phases, lambda r: r.phase, names)), more.assumptions)
