"""One candidate on a captured graph of few layers: compiled up to where its memory is decided, then finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.strategy_cost import Problem
from spcompile.graph.edit import copy_module
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import bytes_alive, host_bytes, saved_bytes
from spcompile.memory.joint import Joint
from spcompile.memory.ladder import Kind, Ladder
from spcompile.memory.liveness import most_by_part
from spcompile.memory.send_to_host import send_to_host
from spcompile.options import Options
from spcompile.parameters.planned_parts import captured_over_planned_parts
from spcompile.parameters.weight_plan import PLANNED, parts_of_parameter, split_over_tp
from spcompile.passes_api import Pass
from spcompile.planning.candidates import Candidate
from spcompile.planning.figures import Figures
from spcompile.program.build import LocalProgram, build_captured
from spcompile.program.emit import Emission, TracedStep, trace_step
from spcompile.program.partition import cut_as_planned, saved_by
from spcompile.program.pipeline import History
from spcompile.schedule.communication import communication
from spcompile.schedule.op_cost import CostModel, attention_flops, cost_model, is_attention, matmul_flops
from spcompile.schedule.op_cost import visible as part_that_a_mask_leaves
from spcompile.schedule.timeline import predict
from spcompile.sharding.rules.attention import merges_keys
from spcompile.torch_private import min_cut_rematerialization_partition


@dataclass(frozen=True)
class Short:
    """A captured graph of few layers.

    own: of each input whether it is a parameter. flops: of its forward, `(products, attention, attention unmasked)`.
    attentions: whose keys have to travel. traced: what SCHEDULE passes have traced for any candidate.
    """

    captured: fx.GraphModule
    inputs: list[Any]
    own: tuple[bool, ...]
    blocks: int
    flops: tuple[float, float, float]
    attentions: tuple[Problem, ...] = ()
    traced: dict[Any, fx.Graph] = field(default_factory=dict, repr=False, compare=False)


@dataclass
class ShortStep:
    """A candidate's step, as far as it does not depend on what is saved."""

    short: Short
    program: LocalProgram
    traced: TracedStep
    base: dict[str, fx.GraphModule]
    ladder: Ladder | None
    cost: CostModel

    def figures(self, rung: int) -> Figures:
        """Of the final graphs, with the trades of a rung of the ladder."""
        return self.figures_of(*self.final_graphs(rung))

    def final_graphs(self, rung: int) -> tuple[dict[str, fx.GraphModule], float]:
        """By phase, with the trades of a rung of the ladder; and the seconds of what they make again."""
        graphs, again = dict(self.base), 0.0
        if self.ladder is not None and rung != 0:
            chosen = self.ladder.rung(rung)
            again = sum(trade.seconds for trade in chosen.trades)
            assert self.traced.joint is not None
            cut = cut_as_planned(
                min_cut_rematerialization_partition,
                self.traced.joint,
                self.traced.inputs,
                chosen.saved,
                chosen.again,
                self.traced.arguments,
            )
            if chosen.away is not None:
                send_to_host(*cut, {node.name for node in chosen.away.values})
            graphs = dict(zip(("forward", "backward"), cut, strict=True))
        emission = Emission(replace(self.program, history=History(verifies=False)), bind=lambda graph: None)
        with torch.no_grad():
            for phase, gm in graphs.items():
                emission.schedule(copy_module(gm), phase)
        return emission.graphs, again

    def with_kinds(self, kinds: tuple[Kind, ...]) -> ShortStep:
        """The same, with a ladder of these kinds of trades alone, as far as it offers them."""
        ladder = self.ladder
        return self if ladder is None else replace(self, ladder=replace(ladder, kinds=kinds))

    def figures_of(self, final: dict[str, fx.GraphModule], again: float) -> Figures:
        """Of such graphs, by the costs of this step."""
        optimizer = self.program.ctx.options.states
        held = [x for x, own in zip(self.program.inputs, self.short.own, strict=True) if own]
        sizes = [(x.numel(), x.element_size()) for x in held]
        trained = [size for size, x in zip(sizes, held, strict=True) if x.requires_grad and "backward" in final]
        step = predict(final, self.cost)
        rows = [r for phase, gm in final.items() for r in communication(phase, gm, self.cost.mesh, self.short.own)]
        sent: dict[tuple[str, str, str, str], tuple[float, float]] = {}
        for row in rows:
            key = (row.op, row.axis, row.phase, row.origin)
            count, size = sent.get(key, (0.0, 0.0))
            sent[key] = (count + row.count, size + float(row.bytes))
        products, attention, attention_full = self.short.flops
        return Figures(
            seconds=step.total("seconds"),
            compute=step.total("compute"),
            communication=step.total("communication"),
            exposed=step.total("exposed"),
            again=again,
            parameters=sum(n * size for n, size in sizes),
            gradients=sum(n * size for n, size in trained),
            states=sum(optimizer.bytes(n, size) for n, size in trained),
            saved=float(saved_bytes(final)),
            peaks=most_by_part(
                {phase: bytes_alive(phase, final, self.cost.accelerator, self.cost.fuses) for phase in final}
            ),
            products=products,
            attention=attention,
            attention_full=attention_full,
            sent=sent,
            host=float(host_bytes(final)),
        )


def short_step(
    short: Short, candidate: Candidate, split: Mapping[str, int | str], options: Options, pipeline: Sequence[Pass]
) -> ShortStep:
    """Compile a candidate up to the partitioner, as `parallelize` would leave its parameters.

    split: by name of a parameter's placeholder: the dim that tp splits, or why it splits none.
    """
    mesh = MeshShape.of(dict(candidate.mesh))
    degrees = dict(candidate.mesh)
    placeholders = short.captured.graph.find_nodes(op="placeholder")
    parts = [
        parts_of_parameter(node.meta["val"].shape, split.get(node.name, ""), degrees, candidate.shard) if own else ()
        for node, own in zip(placeholders, short.own, strict=True)
    ]
    over_parts = captured_over_planned_parts(short.captured, short.inputs, parts)
    passes = pipeline if mesh.world_size > 1 else [p for p in pipeline if p.axis is None]
    program = build_captured(*over_parts, mesh, options, passes, History(verifies=False))
    program = replace(program, ctx=replace(program.ctx, traced=short.traced))
    traced = trace_step(program)
    base = traced.cut(min_cut_rematerialization_partition)
    cost = cost_model(mesh, options)
    ladder = None
    if traced.joint is not None:
        joint = Joint.of(traced.joint.graph, traced.arguments["num_fwd_outputs"], cost.accelerator, cost.fuses)
        saved = saved_by(traced.joint, base["forward"], base["backward"])
        ladder = Ladder.of(joint, saved, cost, options.states)
    return ShortStep(short, program, traced, base, ladder, cost)


def split_of_parameters(
    short: Short, mesh: MeshShape, options: Options, pipeline: Sequence[Pass]
) -> dict[str, int | str]:
    """By name of a placeholder: the dim that tp splits, or why it splits none. It does not depend on attention."""
    if mesh.size("tp") == 1:
        return {}
    passes = pipeline[: [p.name for p in pipeline].index(PLANNED) + 1]
    history = History(verifies=False)
    program = build_captured(
        copy_module(short.captured), short.inputs, mesh, replace(options, passes={}), passes, history
    )
    names = [node.name for node in short.captured.graph.find_nodes(op="placeholder")]
    return dict(zip(names, split_over_tp(program.gm.graph, mesh.size("tp")), strict=True))


def problems_of(graph: fx.Graph) -> tuple[Problem, ...]:
    """Of a graph before anything in it is about several ranks: attentions that a ring or all-to-alls spread over cp."""
    calls = [AttentionCall.of(node) for node in AttentionCall.all_in(graph)]
    return tuple(Problem.of(call) for call in calls if not (merges_keys(call) or call.bias_has_rows))


def forward_flops(graph: fx.Graph) -> tuple[float, float, float]:
    """Of a graph before anything in it is about several ranks: products, attention as masked, attention unmasked."""
    products = attention = full = 0.0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_attention(node):
            flops = attention_flops(node)
            call = AttentionCall.of(node)
            attention += flops
            full += flops / max(part_that_a_mask_leaves(call.attention_mask, call.sizes.hints().k_rows), 1e-9)
        else:
            products += matmul_flops(node)
    return products, attention, full
