"""`spcompile.explain`: what would be computed, sent and kept, without devices. Imports nothing until it is called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.fx as fx
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from spcompile.diagnostics import Remark
    from spcompile.machine.mesh import MeshShape
    from spcompile.options import Options
    from spcompile.parameters.sharded_modules import Parts
    from spcompile.passes_api import Pass
    from spcompile.program.build import LocalProgram
    from spcompile.program.pipeline import Snapshot
    from spcompile.program.trace import Traced
    from spcompile.report.answers import Answers
    from spcompile.report.plan import Folded, PassRow, Plan, Sharding

LARGEST = 10  # kinds of tensors in the report


def explain(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    mesh: Mapping[str, int] | DeviceMesh,
    *,
    shard_parameters: str | Sequence[str] | None = None,
    fold_layers: bool = False,
    **options: Any,
) -> Plan:
    """What the backend would make of a model on a mesh; needs no process group, and computes nothing.

    With on_graph_break="gather" a model that breaks is explained part by part, `plan.parts`. What is behind a break may
    depend on values, so the parts in front of it are computed, on one device.

    model: its weights may be real, fake or on `meta`. It is compiled for training if gradients are enabled.
    example_inputs: keyword arguments (a dict) or positional ones; torch._dynamo.mark_dynamic works on them.
    shard_parameters: explains the model as `parallelize` leaves it, with these axes; () for none; None: drop-in.
    fold_layers: of layers that are equal in the graph a few are compiled, and the plan says so: what is counted, saved
        and sent is that of all, peaks and times are a few percent off at most, graphs are those of few layers. All are
        compiled in any case where a step does not fit with all values saved.
    options: those of the backend, but `mesh`.

    Raises:
        SpcompileError: an illegal option or mesh, a model that is not one graph, a remark under strict.
    """
    from contextlib import nullcontext

    from spcompile.capture.graph_breaks import model_part_of
    from spcompile.capture.meta_device import off_meta
    from spcompile.options import Options
    from spcompile.parameters.planned_parts import over_planned_parts
    from spcompile.passes import PIPELINE
    from spcompile.program.plugins import with_plugins
    from spcompile.program.trace import compile_for, mesh_shape, through_dynamo
    from spcompile.program.whole_batch import over_whole_batch
    from spcompile.report.few_layers import plan_of_few_layers
    from spcompile.report.put_back import put_back

    shape, chosen = mesh_shape(mesh), Options.parse(options)
    pipeline = with_plugins(PIPELINE, chosen)
    parts = _planned_parts(model, example_inputs, shape, chosen, shard_parameters)
    plans: list[Plan] = []

    def describe(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        split = [parts.get(id(value), ()) for value in inputs]
        own = {id(p) for p in model.parameters()}
        moved = off_meta(gm, inputs)
        trained = [id(value) in own for value in inputs]
        unread = own - {id(value) for value in inputs}
        weights: list[tuple[int, int]] = []

        def plan_of(traced: Traced, kept: Sequence[int]) -> Plan:
            read = {id(inputs[place]) for place in kept} | unread
            held = _parts_held([p for p in model.parameters() if id(p) in read], parts)
            if shard_parameters is None:
                weights.extend(_weight_bytes(model, traced.program, [inputs[place] for place in kept]))
            return _plan(model, traced, chosen, [trained[place] for place in kept], held)

        plan = None
        if fold_layers and model_part_of(gm) is None and not _is_parallelized(model):
            plan = plan_of_few_layers(*moved, split, shape, chosen, pipeline, plan_of)
        if plan is None:
            weights.clear()
            plan = plan_of(compile_for(*over_planned_parts(*moved, split), shape, chosen, pipeline), range(len(inputs)))
        plan.remarks.extend(_weight_remarks(model, weights, plan.folded))
        del plan.largest_tensors[LARGEST:]
        if not plan.memory.fits and model_part_of(gm) is None:
            ways = _ways_to_fit(gm, inputs, trained, shape, chosen, pipeline)
            plan = replace(plan, answers=replace(plan.answers, ways=tuple(ways)))
        plans.append(plan)

    with put_back(model, example_inputs) if chosen.on_graph_break == "gather" else nullcontext():
        through_dynamo(model, example_inputs, over_whole_batch(describe, shape.size("dp")), chosen, shape.size("dp"))
    return replace(plans[0], parts=plans[1:])


def _weight_bytes(model: nn.Module, program: LocalProgram, inputs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Of parameters that a program reads: all bytes, and those of a rank under `parallelize`. Nothing without tp."""
    from spcompile.parameters.weight_plan import PLANNED, split_over_tp, weight_plan

    snapshot = next((s for s in program.history.snapshots if s.name == PLANNED), None)
    if snapshot is None or snapshot.gm is None or _is_parallelized(model):
        return
    mesh = program.ctx.mesh
    names = {id(p): name for name, p in model.named_parameters()}
    found = zip(inputs, split_over_tp(snapshot.gm.graph, mesh.size("tp")), strict=True)
    split = {names[id(value)]: dim for value, dim in found if id(value) in names}
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    others = sum(size for name, size in sizes.items() if name not in split)
    plan = weight_plan(model, split, dict(mesh.axes))
    yield sum(sizes.values()) - others, plan.bytes_per_rank(model) - others


def _weight_remarks(model: nn.Module, found: Sequence[tuple[int, int]], folded: Folded | None) -> Iterator[Remark]:
    """Drop-in use of tp splits the work on the weights, not the weights that a rank holds: say what that costs."""
    from spcompile.diagnostics import Remark

    if not found:
        return
    read, own = found[0] if folded is None else map(folded.line.at, *found)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    text = (
        f"every rank of tp holds all {whole:,} bytes of parameters; under spcompile.parallelize it would hold "
        f"{whole - read + own:,}"
    )
    yield Remark("SPR505", text, strict_error=False)


def _is_parallelized(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


def _planned_parts(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    shape: MeshShape,
    options: Options,
    shard_parameters: str | Sequence[str] | None,
) -> dict[int, Parts]:
    """By the id of a parameter: how `parallelize` splits it. Nothing where the model is used as it is."""
    from spcompile.parallelize import planned_weights, require_axes

    if shard_parameters is None:
        return {}
    axes = (shard_parameters,) if isinstance(shard_parameters, str) else tuple(shard_parameters)
    require_axes(axes, shape)
    parts = planned_weights(model, example_inputs, shape, options, axes).parts
    return {id(p): parts[name] for name, p in model.named_parameters()}


def _parts_held(parameters: Sequence[torch.Tensor], parts: Mapping[int, Parts]) -> list[torch.Tensor]:
    """What a rank has of each parameter, without values."""
    import torch

    from spcompile.parameters.sharded_modules import local_shape

    def part(p: torch.Tensor) -> torch.Tensor:
        own = torch.empty(local_shape(p.shape, parts[id(p)]), dtype=p.dtype, device="meta")
        return own.requires_grad_(p.requires_grad)

    return [part(p) if parts.get(id(p)) else p for p in parameters]


def _plan(
    model: nn.Module, traced: Traced, options: Options, trained: Sequence[bool], held: Sequence[torch.Tensor]
) -> Plan:
    from spcompile.machine.accelerators import ACCELERATORS
    from spcompile.memory.account import memory_of
    from spcompile.memory.largest import largest_tensors
    from spcompile.planning.one_device_saves import saved_on_one_device
    from spcompile.report.attention_rows import attention_rows
    from spcompile.report.plan import Plan
    from spcompile.report.step_trace import phase_trace
    from spcompile.schedule.communication import communication, sends_of
    from spcompile.schedule.op_cost import cost_model
    from spcompile.schedule.timeline import predict, records_of

    program = traced.program
    final = traced.sharded.graphs
    graphs, passes = _history(program)
    cost = cost_model(program.ctx.mesh, options)
    records = records_of(final, cost)
    return Plan(
        model=type(model).__name__,
        mesh=program.ctx.mesh,
        options={name: getattr(options, name) for name in vars(options) if name != "mesh"},
        sharding=_sharding(program),
        attention=attention_rows(_last_global_graph(program), program),
        collectives=[r for phase, gm in final.items() for r in communication(phase, gm, program.ctx.mesh, trained)],
        memory=memory_of(
            final,
            saved_on_one_device(traced),
            held,
            options.states,
            ACCELERATORS[options.accelerator],
            traced.sharded.memory,
            fuses=options.compiler == "inductor",
        ),
        remarks=list(program.ctx.remarks.rows),
        passes=passes,
        largest_tensors=largest_tensors(final, None),
        predicted=predict(final, cost),
        answers=_answers(model, traced, options),
        symbols=_symbols(program),
        graphs=graphs,
        sends={_name_of(phase): sends_of(gm, program.ctx.mesh) for phase, gm in final.items()},
        events={_name_of(phase): record.events for phase, record in records.items()},
        trace=[phase_trace(phase, final, record, cost) for phase, record in records.items()],
        files=_files_of_user(program.captured),
    )


def _name_of(phase: str) -> str:
    """Of a final graph among a plan's graphs."""
    return "forward" if phase == "inference" else phase


def _files_of_user(captured: fx.GraphModule) -> dict[str, str]:
    """The files whose lines made the graph, by name; of two with one name the first."""
    from spcompile.diagnostics import source_of

    found: dict[str, str] = {}
    for node in captured.graph.nodes:
        source = source_of(node)
        if source is not None:
            found.setdefault(source.file.rpartition("/")[2], source.file)
    return found


def _answers(model: nn.Module, traced: Traced, options: Options) -> Answers:
    """The work of a step, of the program before anything in it is about several devices."""
    from spcompile.attention.scores.attention_call import AttentionCall
    from spcompile.machine.accelerators import ACCELERATORS
    from spcompile.planning.short_step import forward_flops
    from spcompile.report.answers import Answers

    before, mesh = traced.model_itself.gm, traced.program.ctx.mesh
    assert before is not None
    passes_over = 3 if "backward" in traced.sharded.graphs else 1  # a backward takes two products for each
    products, attention, full = (passes_over * flops for flops in forward_flops(before.graph))
    calls = [AttentionCall.of(node).sizes.hints() for node in AttentionCall.all_in(before.graph)]
    sizes = [p.element_size() for p in model.parameters() if p.is_floating_point()]
    return Answers(
        world=mesh.world_size,
        tokens=min(c.q_rows for c in calls) * max(c.batch for c in calls) if calls else None,
        flops=products + attention,
        flops_full=products + full,
        peak=ACCELERATORS[options.accelerator].peak(min(sizes, default=4)) * mesh.world_size,
        optimizer=str(options.optimizer),
    )


def _ways_to_fit(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    trained: Sequence[bool],
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
) -> list[str]:
    """What makes a step fit; nothing for a model without attention, or whose lengths are symbols."""
    from spcompile.diagnostics import IllegalModel
    from spcompile.planning.search import depths_of
    from spcompile.planning.ways_to_fit import ways_to_fit
    from spcompile.program.progress import begins

    begins("looking for what would fit")
    if any(not isinstance(size, int) for x in inputs for size in getattr(x, "shape", ())):
        return []
    try:
        depths = depths_of(gm, inputs, trained, options, pipeline)
    except IllegalModel:
        return []
    return ways_to_fit(depths, mesh, options, pipeline)


def _history(program: LocalProgram) -> tuple[dict[str, str], list[PassRow]]:
    """Texts by name and passes in order. What ran on the backward graph alone has its name with "(backward)"."""
    from spcompile.passes_api import Stage
    from spcompile.report.plan import PassRow

    graphs: dict[str, str] = {}
    rows: list[PassRow] = []
    finals: dict[str, str] = {}
    pending: list[Snapshot] = []
    for snapshot in program.history.snapshots:
        report = snapshot.report
        if snapshot.name in ("forward", "backward", "inference"):
            phase = snapshot.name
            finals["forward" if phase == "inference" else phase] = snapshot.text
            for earlier in pending:
                suffix = " (backward)" if phase == "backward" else ""
                graphs[earlier.name + suffix] = earlier.text
                row = earlier.report
                rows.append(PassRow(earlier.name, earlier.stage.value, phase, row.rewrites, row.milliseconds))
            pending = []
        elif snapshot.stage is Stage.SCHEDULE:
            pending.append(snapshot)
        else:
            graphs[snapshot.name] = snapshot.text
            if snapshot.name != "capture":
                rows.append(PassRow(snapshot.name, snapshot.stage.value, "", report.rewrites, report.milliseconds))
    return graphs | dict(sorted(finals.items(), reverse=True)), rows


def _sharding(program: LocalProgram) -> Sharding:
    """An op runs on shards if it chose a factor, of cp or, on a mesh without cp, of tp."""
    from spcompile.attention.scores.attention_call import AttentionCall
    from spcompile.graph.reshard import is_reshard
    from spcompile.graph.sizes import expression
    from spcompile.machine.sequence import local_length
    from spcompile.report.plan import Sharding
    from spcompile.sharding.layout import layout_of
    from spcompile.sharding.sequences import SCORES, UNREAD_ATTENTION

    parallel = program.ctx.mesh.size("cp") > 1
    graph = _last_global_graph(program) if parallel else _last_global(program)
    calls = [n for n in graph.nodes if n.op == "call_function" and not is_reshard(n)]
    on_shards = [n for n in calls if (layout := layout_of(n)) is not None and layout.choice]
    lengths = [AttentionCall.of(n).sizes.q_rows for n in on_shards if AttentionCall.is_call(n)]
    custom = [(n, n.meta.get("custom", {})) for n in on_shards]
    rows = [(n, found.get(UNREAD_ATTENTION) or found.get(SCORES)) for n, found in custom]
    lengths += [n.meta["val"].shape[dim] for n, dim in rows if dim]
    order = program.ctx.order
    if not lengths:
        return Sharding(order, len(on_shards), len(calls), None, None)
    local = local_length(lengths[0], program.ctx.mesh.size("cp"), order)
    return Sharding(order, len(on_shards), len(calls), expression(lengths[0]), expression(local))


def _last_global(program: LocalProgram) -> fx.Graph:
    """What the last axis is placed on: the sequence of one rank of cp."""
    from spcompile.passes_api import Stage

    gm = [s.gm for s in program.history.snapshots if s.stage is Stage.GLOBAL][-1]
    assert gm is not None
    return gm.graph


def _last_global_graph(program: LocalProgram) -> fx.Graph:
    """The last graph with the whole sequence; on one device the program before autograd."""
    from itertools import takewhile

    from spcompile.passes_api import Stage

    whole = takewhile(lambda s: s.name != "lower" and s.stage is not Stage.SCHEDULE, program.history.snapshots)
    gm = list(whole)[-1].gm
    assert gm is not None
    return gm.graph


def _symbols(program: LocalProgram) -> dict[str, str]:
    """Every symbol that is the size of an input, and of which dim."""
    import torch

    found: dict[str, str] = {}
    for node in program.captured.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        for dim, size in enumerate(val.shape if isinstance(val, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and str(size) not in found:
                found[str(size)] = f"size {dim} of input {re.sub(r'^l_(kwargs_|args_)?|_$', '', node.name)}"
    return found
