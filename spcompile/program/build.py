"""The compiler proper, without devices: a Dynamo graph and a mesh shape in, one rank's graph out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.autocast import autocast_off
from spcompile.capture.graph_breaks import ModelPart, model_part_of
from spcompile.capture.retrace import OWN, capture
from spcompile.diagnostics import BatchNotSplit, Remarks, source_of
from spcompile.graph.edit import copy_module
from spcompile.graph.reshard import Place, parse_place
from spcompile.graph.sizes import hint
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Context, Pass, PassReport, Stage
from spcompile.program.pipeline import History, check_order, configure, run_passes
from spcompile.sharding.batch_entries import mark_batch
from spcompile.sharding.global_view import mark_parts
from spcompile.sharding.resharding import blocks_of, state_of


@dataclass
class Output:
    """What became of one output of the user's graph.

    index: its place among the outputs of the local graph; None if it is not computed.
    dims: the tensor dims over which axes leave it split: `dp` its entries, `cp` under outputs="sharded".
    blocks: how often the entries of the batch stand behind each other in the dim that `dp` splits, where a rank has its
        own of each block.
    shape: of the whole over all axes, where it is split or not computed.
    """

    index: int | None
    dims: dict[str, int] = field(default_factory=dict)
    shape: tuple[Any, ...] | None = None
    blocks: int = 1


@dataclass
class LocalProgram:
    """One rank's graph, before autograd, and everything learnt on the way. all_inputs: of the captured graph."""

    gm: fx.GraphModule
    inputs: list[Any]
    all_inputs: list[Any]
    outputs: list[Output]
    ctx: Context
    history: History
    captured: fx.GraphModule
    schedule: list[Pass] = field(default_factory=list)

    @property
    def is_sharded(self) -> bool:
        """Whether anything was sharded at all."""
        return any(n.op == "call_function" and "spx" in str(n.target) and _has_axis(n) for n in self.gm.graph.nodes)

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a call of the graph changes the random state."""
        tag = torch.Tag.nondeterministic_seeded
        return any(tag in getattr(n.target, "tags", ()) for n in self.gm.graph.nodes)

    def forget_inputs(self) -> None:
        """When it is compiled: Dynamo keeps what was compiled, for later models, which may not keep this one alive."""
        self.inputs, self.all_inputs = [], []


def _has_axis(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.name == "axis" for a in schema.arguments)


def build(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    history: History | None = None,
) -> LocalProgram:
    """Capture a Dynamo graph and run the GLOBAL and LOCAL stages.

    Raises:
        SpcompileError: the graph cannot be captured, or a remark came under strict.
    """
    options.require_factors(mesh.size("cp"))
    captured = capture(gm, inputs)
    return build_captured(captured, inputs, mesh, options, pipeline, history, model_part_of(gm))


def build_captured(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    history: History | None = None,
    part: ModelPart | None = None,
) -> LocalProgram:
    """The GLOBAL and LOCAL stages on a captured graph, which gets marks for this mesh. part: of a broken model."""
    passes = [p for p in configure(pipeline, options.passes) if p.runs_on(mesh)]
    check_order(passes)
    ctx = Context(mesh, options, Remarks(strict=options.strict))
    if part is not None:
        ctx.remarks.add("SPR105", part.text(captured.graph), where=part.where)
    mark_parts(captured.graph)
    mark_batch(captured.graph, mesh.size("dp"))
    with autocast_off():
        return _build(captured, inputs, ctx, passes, history or History())


def _build(
    captured: fx.GraphModule, inputs: Sequence[Any], ctx: Context, passes: Sequence[Pass], history: History
) -> LocalProgram:
    options = ctx.options
    work = copy_module(captured)
    history.add("capture", Stage.GLOBAL, work, ctx, PassReport())
    outputs = _select_outputs(work, options)
    before_autograd = [p for p in passes if p.stage is not Stage.SCHEDULE]
    done = 0
    for index, p in enumerate(before_autograd):
        if p.leaves is Stage.LOCAL:  # layouts are gone behind it
            run_passes(work, before_autograd[done:index], ctx, history)
            _note_split_outputs(work, outputs, p.axis or "cp", ctx, captured.graph)
            done = index
    run_passes(work, before_autograd[done:], ctx, history)
    work.recompile()
    schedule = [p for p in passes if p.stage is Stage.SCHEDULE]
    given = zip(captured.graph.find_nodes(op="placeholder"), inputs, strict=True)
    own = [node.meta.get(OWN, x) for node, x in given]
    return LocalProgram(work, own, list(inputs), outputs, ctx, history, captured, schedule)


def _output_node(graph: fx.Graph) -> fx.Node:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def _flat_outputs(graph: fx.Graph) -> list[Any]:
    values = _output_node(graph).args[0]
    return list(values) if isinstance(values, (tuple, list)) else [values]


def _select_outputs(gm: fx.GraphModule, options: Options) -> list[Output]:
    """Flatten the outputs; outputs="loss" drops everything but scalars, and with it what only they needed."""
    node = _output_node(gm.graph)
    flat = _flat_outputs(gm.graph)
    kept: list[Any] = []
    outputs: list[Output] = []
    for value in flat:
        example = value.meta.get("val") if isinstance(value, fx.Node) else None
        if options.outputs == "loss" and isinstance(example, torch.Tensor) and example.ndim > 0:
            outputs.append(Output(None, shape=tuple(example.shape)))
            continue
        outputs.append(Output(len(kept)))
        kept.append(value)
    node.args = (tuple(kept),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return outputs


def _note_split_outputs(gm: fx.GraphModule, outputs: list[Output], axis: str, ctx: Context, captured: fx.Graph) -> None:
    """Remember over which dim the axis leaves each output split."""
    values = _output_node(gm.graph).args[0]
    own = _output_node(captured).meta.get(OWN)
    assert isinstance(values, (tuple, list))
    for number, output in enumerate(outputs):
        value = values[output.index] if output.index is not None else None
        place = parse_place(state_of(value, axis)) if isinstance(value, fx.Node) else None
        if place is not None and isinstance(value, fx.Node):
            output.dims[axis] = place.dim
            output.blocks = blocks_of(value, place) if axis == "dp" else output.blocks
            if output.shape is None:
                output.shape = tuple(value.meta["val"].shape)
        if own is not None and axis == "dp":
            _require_own_shape(value, place, own[number], ctx.mesh.size(axis))


def _require_own_shape(value: Any, place: Place | None, own: Sequence[Any] | None, degree: int) -> None:
    """A caller gets of each output what the model makes of its entries: the shape is that of Dynamo's own graph."""
    if own is None or not isinstance(value, fx.Node):
        return
    shape = [hint(size) for size in value.meta["val"].shape]
    if place is not None:
        shape[place.dim] //= degree
    if shape != [hint(size) for size in own]:
        found = f"the output {value.name} would be {shape} on a rank, but its own entries give {list(own)}"
        raise BatchNotSplit(found, where=source_of(value), legal="outputs with entries of inputs, or DDP over dp")
