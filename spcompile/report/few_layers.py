"""A plan without compiling all layers: of two programs with a few of those that are equal, continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.retrace import capture
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.planner import ROOM, MemoryPlan
from spcompile.options import Options
from spcompile.parameters.planned_parts import captured_over_planned_parts
from spcompile.parameters.sharded_modules import Parts
from spcompile.passes_api import Pass
from spcompile.planning.equal_blocks import find_equal_blocks, shortened
from spcompile.planning.search import MORE
from spcompile.program.progress import begins
from spcompile.program.trace import Traced, compile_captured
from spcompile.report.folded_plan import folded_plan
from spcompile.report.line_of_depths import Line
from spcompile.report.plan import Folded, Plan

_LEAST = 2  # layers: the first and the last may save what others do not


def plan_of_few_layers(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    split: Sequence[Parts],
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    plan_of: Callable[[Traced, list[int]], Plan],
) -> Plan | None:
    """Of a Dynamo graph with example inputs on a device.

    split: how each input is split, () where it is whole. plan_of: a plan of a compiled graph, with the places of the
        inputs that it still has.

    None where all layers must be compiled: too few are equal, lengths are symbols, or a step does not fit with all
    values saved.
    """
    if options.memory == "min" or any(isinstance(size, torch.SymInt) for x in inputs for size in _sizes_of_input(x)):
        return None
    begins("reading the graph")
    captured = capture(gm, inputs)
    found = find_equal_blocks(captured.graph, ACCELERATORS[options.accelerator])
    least = max(_LEAST, found.least) if found is not None else 0
    if found is None or found.count <= least + MORE:
        return None
    compiled, kept_inputs = [], []
    for keep in (least, least + MORE):
        short, kept = shortened(captured, inputs, found, keep)
        parts = [split[place] for place in kept]
        over_parts: tuple[fx.GraphModule, list[Any]] = (short, [inputs[place] for place in kept])
        if any(parts):
            over_parts = captured_over_planned_parts(*over_parts, parts)
        is_read = keep > least  # the report shows texts of the second alone
        compiled.append(compile_captured(*over_parts, mesh, options, pipeline, keep_texts=is_read))
        kept_inputs.append(kept)
    folded = Folded(found.count, (least, least + MORE))
    if not _saves_nothing([traced.sharded.memory for traced in compiled], folded.line):
        return None
    plans = [plan_of(traced, kept) for traced, kept in zip(compiled, kept_inputs, strict=True)]
    return folded_plan(plans[0], plans[1], folded)


def _saves_nothing(plans: Sequence[MemoryPlan | None], line: Line) -> bool:
    """Whether at all layers everything is saved, as `plan_memory` decides it: by what is alive in the joint graphs."""
    few, more = plans
    if few is None or more is None or more.limit is None:
        return True
    if few.trades or more.trades:
        return False
    ends = [line.at(a, b) for a, b in zip(few.ends_as_it_was, more.ends_as_it_was, strict=True)]
    return bool(line.at(few.state_bytes, more.state_bytes) + max(ends) <= ROOM * more.limit)


def _sizes_of_input(value: Any) -> Sequence[Any]:
    return (value,) if isinstance(value, torch.SymInt) else getattr(value, "shape", ())
