"""A plan without compiling all layers: of two programs with a few of those that are equal, continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.retrace import capture
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.planner import ROOM
from spcompile.options import Options
from spcompile.parameters.planned_parts import captured_over_planned_parts
from spcompile.parameters.sharded_modules import Parts
from spcompile.passes_api import Pass
from spcompile.planning.equal_blocks import find_equal_blocks, shortened
from spcompile.planning.search import MORE
from spcompile.program.progress import begins
from spcompile.program.trace import Traced, compile_captured
from spcompile.report.folded_plan import folded_plan
from spcompile.report.plan import Plan

SURE = 0.9  # of the budget: continued peaks are off by a few percent, and a plan that saves memory is for all layers
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

    None where all layers must be compiled: too few are equal, lengths are symbols, or a step takes so much of its
    budget that memory must be saved.
    """
    if options.memory == "min" or any(isinstance(size, torch.SymInt) for x in inputs for size in _sizes_of_input(x)):
        return None
    begins("reading the graph")
    captured = capture(gm, inputs)
    found = find_equal_blocks(captured.graph, ACCELERATORS[options.accelerator])
    least = max(_LEAST, found.least) if found is not None else 0
    if found is None or found.count <= least + MORE:
        return None
    plans = []
    for keep in (least, least + MORE):
        short, kept = shortened(captured, inputs, found, keep)
        parts = [split[place] for place in kept]
        over_parts: tuple[fx.GraphModule, list[Any]] = (short, [inputs[place] for place in kept])
        if any(parts):
            over_parts = captured_over_planned_parts(*over_parts, parts)
        plans.append(plan_of(compile_captured(*over_parts, mesh, options, pipeline), kept))
    plan = folded_plan(plans[0], plans[1], (least, least + MORE), found.count)
    if plan is None:
        return None
    budget = plan.memory.budget_bytes
    return plan if budget is None or plan.memory.total_bytes <= SURE * ROOM * budget else None


def _sizes_of_input(value: Any) -> Sequence[Any]:
    return (value,) if isinstance(value, torch.SymInt) else getattr(value, "shape", ())
