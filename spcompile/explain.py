"""`spcompile.explain`: what would be computed, sent and kept, without devices. Imports nothing until it is called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.fx as fx
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from spcompile.attention.scores.attention_call import AttentionCall
    from spcompile.machine.mesh import MeshShape
    from spcompile.options import Options
    from spcompile.parameters.sharded_modules import Parts
    from spcompile.program.build import LocalProgram
    from spcompile.program.pipeline import Snapshot
    from spcompile.program.trace import Traced
    from spcompile.report.plan import AttentionRow, PassRow, Plan, Sharding

LARGEST = 10  # tensors in the report


def explain(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    mesh: Mapping[str, int] | DeviceMesh,
    *,
    shard_parameters: str | Sequence[str] | None = None,
    **options: Any,
) -> Plan:
    """What the backend would make of a model on a mesh; needs no process group, and computes nothing.

    With on_graph_break="gather" a model that breaks is explained part by part, `plan.parts`. What is behind a break may
    depend on values, so the parts in front of it are computed, on one device.

    model: its weights may be real, fake or on `meta`. It is compiled for training if gradients are enabled.
    example_inputs: keyword arguments (a dict) or positional ones; torch._dynamo.mark_dynamic works on them.
    shard_parameters: explains the model as `parallelize` leaves it, with these axes; () for none; None: drop-in.
    options: those of the backend, but `mesh`.

    Raises:
        SpcompileError: an illegal option or mesh, a model that is not one graph, a remark under strict.
    """
    from contextlib import nullcontext
    from dataclasses import replace

    from spcompile.capture.meta_device import off_meta
    from spcompile.options import Options
    from spcompile.parameters.planned_parts import over_planned_parts
    from spcompile.passes import PIPELINE
    from spcompile.program.trace import compile_for, mesh_shape, through_dynamo
    from spcompile.program.whole_batch import over_whole_batch
    from spcompile.report.put_back import put_back

    shape, chosen = mesh_shape(mesh), Options.parse(options)
    parts = _planned_parts(model, example_inputs, shape, chosen, shard_parameters)
    plans: list[Plan] = []

    def describe(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        split = [parts.get(id(value), ()) for value in inputs]
        own = {id(p) for p in model.parameters()}
        moved = off_meta(gm, inputs)
        traced = compile_for(*over_planned_parts(*moved, split), shape, chosen, PIPELINE)
        if shard_parameters is None:
            _remark_weight_memory(model, traced.program, inputs)
        plans.append(_plan(model, traced, chosen, [id(value) in own for value in inputs], _parts_held(model, parts)))

    with put_back(model, example_inputs) if chosen.on_graph_break == "gather" else nullcontext():
        through_dynamo(model, example_inputs, over_whole_batch(describe, shape.size("dp")), chosen, shape.size("dp"))
    return replace(plans[0], parts=plans[1:])


def _remark_weight_memory(model: nn.Module, program: LocalProgram, inputs: Sequence[Any]) -> None:
    """Drop-in use of tp splits the work on the weights, not the weights that a rank holds: say what that costs."""
    from torch.distributed.tensor import DTensor

    from spcompile.parameters.weight_plan import PLANNED, split_over_tp, weight_plan

    snapshot = next((s for s in program.history.snapshots if s.name == PLANNED), None)
    if snapshot is None or snapshot.gm is None or any(isinstance(p, DTensor) for p in model.parameters()):
        return
    mesh = program.ctx.mesh
    names = {id(p): name for name, p in model.named_parameters()}
    found = zip(inputs, split_over_tp(snapshot.gm.graph, mesh.size("tp")), strict=True)
    split = {names[id(value)]: dim for value, dim in found if id(value) in names}
    plan = weight_plan(model, split, dict(mesh.axes))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    program.ctx.remarks.add(
        "SPR505",
        f"every rank of tp holds all {whole:,} bytes of parameters; under spcompile.parallelize it would hold "
        f"{plan.bytes_per_rank(model):,}",
        strict_error=False,
    )


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


def _parts_held(model: nn.Module, parts: Mapping[int, Parts]) -> list[torch.Tensor]:
    """What a rank has of each parameter, without values."""
    import torch

    from spcompile.parameters.sharded_modules import local_shape

    def part(p: torch.Tensor) -> torch.Tensor:
        own = torch.empty(local_shape(p.shape, parts[id(p)]), dtype=p.dtype, device="meta")
        return own.requires_grad_(p.requires_grad)

    return [part(p) if parts.get(id(p)) else p for p in model.parameters()]


def _plan(
    model: nn.Module, traced: Traced, options: Options, trained: Sequence[bool], held: Sequence[torch.Tensor]
) -> Plan:
    from spcompile.machine.accelerators import ACCELERATORS
    from spcompile.memory.account import memory_of
    from spcompile.memory.largest import largest_tensors
    from spcompile.program.trace import on_one_device
    from spcompile.report.plan import Plan
    from spcompile.schedule.communication import communication
    from spcompile.schedule.op_cost import cost_model
    from spcompile.schedule.timeline import predict

    program = traced.program
    final = traced.sharded.graphs
    graphs, passes = _history(program)
    return Plan(
        model=type(model).__name__,
        mesh=program.ctx.mesh,
        options={name: getattr(options, name) for name in vars(options) if name != "mesh"},
        sharding=_sharding(program),
        attention=_attention_rows(program),
        collectives=[r for phase, gm in final.items() for r in communication(phase, gm, program.ctx.mesh, trained)],
        memory=memory_of(
            final,
            on_one_device(traced),
            held,
            options.states,
            ACCELERATORS[options.accelerator],
            traced.sharded.memory,
            fuses=options.compiler == "inductor",
        ),
        remarks=list(program.ctx.remarks.rows),
        passes=passes,
        largest_tensors=largest_tensors(final, LARGEST),
        predicted=predict(final, cost_model(program.ctx.mesh, options)),
        symbols=_symbols(program),
        graphs=graphs,
    )


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


def _attention_rows(program: LocalProgram) -> list[AttentionRow]:
    from spcompile.attention.scores.attention_call import AttentionCall
    from spcompile.recognition.attention_nodes import AVERAGED, OF_ROWS_WITHOUT_KEYS
    from spcompile.report.plan import AttentionRow

    parallel = program.ctx.mesh.world_size > 1
    kinds: Counter[tuple[str, int, int, str, str, str]] = Counter()
    for node in AttentionCall.all_in(_last_global_graph(program)):
        call, custom = AttentionCall.of(node), node.meta.get("custom", {})
        if OF_ROWS_WITHOUT_KEYS in custom:
            continue  # a part of the one in front of it
        sizes = call.sizes.hints()
        strategy = custom.get("spx_attention", "ring") if parallel else "one device"
        scores = _scores_text(call, AVERAGED in custom)
        kernel = _kernel_text(call, strategy, program)
        kinds[(strategy, sizes.heads, sizes.kv_heads, call.mask, scores, kernel)] += 1
    return [AttentionRow(strategy, n, heads, kv, *rest) for (strategy, heads, kv, *rest), n in kinds.items()]


def _kernel_text(call: AttentionCall, strategy: str, program: LocalProgram) -> str:
    """The kernel that computes an attention on the accelerator of the options."""
    from spcompile.attention.kernels.choice import Wanted, kernels_for
    from spcompile.graph.typed_call import value_of
    from spcompile.machine.accelerators import ACCELERATORS

    capability = ACCELERATORS[program.ctx.options.accelerator].capability
    if capability is None:
        return ""
    sizes = call.sizes.hints()
    more = (call.bias, call.alibi_slopes, call.sinks)
    wanted = Wanted(
        capability=capability,
        dtype=value_of(call.q).dtype,
        head_size=sizes.qk_size,
        v_size=sizes.v_size,
        mask=call.attention_mask,
        is_plain=not call.has_softcap and not call.has_dropout and all(x is None for x in more),
        in_hops=program.ctx.mesh.size("cp") > 1 and strategy != "ulysses",
        square=sizes.q_rows == sizes.k_rows,
        scale=call.scale,
    )
    return kernels_for(wanted)[0].name


def _scores_text(call: AttentionCall, is_averaged: bool) -> str:
    """What an attention does to scores beside its mask."""
    found = {
        f"softcap {call.softcap:g}": call.has_softcap,
        "ALiBi": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        f"dropout {call.dropout_p:g}": call.has_dropout,
        "dense bias": call.bias is not None,
        "rows without keys apart": is_averaged,
    }
    return ", ".join(name for name, is_there in found.items() if is_there)


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
