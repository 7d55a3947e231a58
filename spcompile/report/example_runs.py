"""Runs the EXAMPLE of a pass: the graphs right before and right after it, without devices.

Tests take numbers from the graphs, docs/passes.md their texts.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import copy_graph
from spcompile.graph.printer import format_graph
from spcompile.machine.mesh import MeshShape
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.program.build import LocalProgram, build
from spcompile.program.emit import Emission, emit
from spcompile.program.pipeline import History, run_passes


@dataclass
class Step:
    """One graph right before and right after a pass.

    phase: "" before autograd, else "forward" or "backward".
    again: the text after a second run, and the rewrites of both runs.
    """

    phase: str
    before: fx.GraphModule
    after: fx.GraphModule
    before_text: str
    after_text: str
    again_text: str
    rewrites: int
    rewrites_again: int
    before_is_local: bool
    after_is_local: bool


@dataclass
class ExampleRun:
    """A pass on its example.

    function: Dynamo's graph of the example, as plain torch runs it. inputs: of it and of all graphs, in order.
    steps: one before autograd, or one for the forward and one for the backward graph.
    """

    function: Callable[..., Any]
    inputs: list[Any]
    ctx: Context
    steps: list[Step]


def example_of(p: Pass) -> Example | None:
    """The EXAMPLE in the file of a pass; one of several, by axis."""
    found = getattr(sys.modules[type(p).__module__], "EXAMPLE", None)
    return found[p.axis] if isinstance(found, Mapping) else found


def run_example(
    p: Pass, pipeline: Sequence[Pass], example: Example, mesh: Mapping[str, int] | None = None
) -> ExampleRun:
    """Run the passes before `p`, then `p` twice, with the fields that the example asks for.

    mesh: other axis sizes than the example's own.
    """
    shape = MeshShape.of(dict(mesh if mesh is not None else example.mesh))
    options = Options(**example.options)
    p = dataclasses.replace(p, **example.fields)

    def work(gm: fx.GraphModule, inputs: Sequence[Any]) -> ExampleRun:
        earlier = pipeline[: [q.name for q in pipeline].index(p.name)]
        if p.stage is Stage.SCHEDULE:
            return _after_autograd(p, earlier, gm, inputs, shape, options)
        program = build(gm, inputs, shape, options, earlier)
        lowers = [q.leaves is Stage.LOCAL for q in (*earlier, p) if q.runs_on(shape)]
        step = _step(p, "", program.gm, program.ctx, is_local=(any(lowers[:-1]), any(lowers)))
        return ExampleRun(gm.forward, list(inputs), program.ctx, [step])

    return with_dynamo_graph(example.function, example.inputs(), work)


def with_dynamo_graph(
    function: Callable[..., Any], inputs: Sequence[Any], work: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Any:
    """What `work(graph, inputs of the graph)` returns, called where torch.compile calls its backend."""
    results: list[Any] = []

    def backend(gm: fx.GraphModule, graph_inputs: Sequence[Any]) -> Callable[..., Any]:
        results.append(work(gm, graph_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return results[0]


def _after_autograd(
    p: Pass, earlier: Sequence[Pass], gm: fx.GraphModule, inputs: Sequence[Any], shape: MeshShape, options: Options
) -> ExampleRun:
    before_autograd = [q for q in earlier if q.stage is not Stage.SCHEDULE]
    program = build(gm, inputs, shape, options, before_autograd)
    program.schedule = [q for q in earlier if q.stage is Stage.SCHEDULE]
    steps = []
    for phase, graph in graphs_after_autograd(program).items():
        steps.append(_step(p, phase, graph, program.ctx, is_local=(True, True)))
    return ExampleRun(gm.forward, list(inputs), program.ctx, steps)


def graphs_after_autograd(program: LocalProgram) -> dict[str, fx.GraphModule]:
    """The forward and the backward graph of a program, after its SCHEDULE passes, with axes as groups."""
    wish = Wish.of(program.ctx.options, program.ctx.mesh.world_size)
    emission = Emission(program, bind=lambda graph: None, wish=wish)
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        emit(emission, "eager")
    return emission.graphs


def _step(p: Pass, phase: str, gm: fx.GraphModule, ctx: Context, *, is_local: tuple[bool, bool]) -> Step:
    before = fx.GraphModule(gm, copy_graph(gm.graph))
    before_text = format_graph(before)
    rewrites = _run(p, gm, ctx)
    after_text = format_graph(gm)
    after = fx.GraphModule(gm, copy_graph(gm.graph))
    again = _run(p, gm, ctx)
    return Step(phase, before, after, before_text, after_text, format_graph(gm), rewrites, again, *is_local)


def _run(p: Pass, gm: fx.GraphModule, ctx: Context) -> int:
    history = History()
    run_passes(gm, [p], ctx, history)
    return history.snapshots[0].report.rewrites


def without_line_numbers(text: str) -> str:
    """The text of a graph with `# file.py:12  code` as `# code`, so that it changes only with what it shows."""
    return re.sub(r"^# [^ ]+:\d+  ", "# ", text, flags=re.MULTILINE)
