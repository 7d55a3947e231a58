"""insert-reshards: make every change of a value's state an explicit node.

Before: calls that want a value in different states read the same node. After: every call reads its operands in the
state it wants, through `reshard(x, axis, src, dst)`; which calls run sharded is a minimum cut over bytes.

On `dp` and `tp` every call runs sharded that can. On `tp` this is Megatron without sequence parallelism. What needs the
entries of other ranks of `dp`, such as a sort of all tokens, gathers them: every rank then computes it for all.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.capture.retrace import OWN
from spcompile.diagnostics import BatchNotSplit, source_of
from spcompile.graph.aten_ops import PERMUTES, overloads
from spcompile.graph.edit import operand
from spcompile.graph.reshard import Place, is_reshard, parse_place
from spcompile.passes.placement.annotate_sharding import LOSS_OF_ENTRIES, MLP
from spcompile.passes_api import AxisPass, Context, Example, OnAxis, Stage
from spcompile.sharding.global_view import is_view
from spcompile.sharding.layout import has_picked_rows, layout_of, show
from spcompile.sharding.lowering import READ_SIZES
from spcompile.sharding.propagate import leaves_sums
from spcompile.sharding.resharding import (
    blocks_of,
    change_state,
    hand_over,
    reads_directly,
    reshard_to,
    reshards_of,
    state_of,
    target_of,
)
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.sharded_or_replicated import sharded_calls, uses_of
from spcompile.sharding.spaces import leaves

_TRANSPOSES = frozenset(overloads(PERMUTES))


@dataclass(frozen=True)
class InsertReshards(AxisPass):
    """Decide which calls run sharded, then insert one reshard per value and state wanted."""

    stage: ClassVar[Stage] = Stage.GLOBAL
    on: ClassVar[Mapping[str, OnAxis]] = {
        "dp": OnAxis(
            "insert-data-reshards",
            frozenset({"annotate-data-parallel"}),
            "sums losses and the gradients of weights over dp",
        ),
        "cp": OnAxis(
            "insert-reshards",
            frozenset({"annotate-context-parallel"}),
            "decides by a minimum cut which calls run sharded, and makes every reshard a node",
        ),
        "tp": OnAxis(
            "insert-tensor-reshards",
            frozenset({"annotate-tensor-parallel"}),
            "makes every reshard of axis tp a node; sums are completed by AllReduces",
        ),
    }

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Insert the reshards of the axis; returns how many.

        Raises:
            BatchNotSplit: random numbers are drawn for entries of other ranks.
        """
        axis = self.axis
        if any(is_reshard(n, axis) for n in gm.graph.nodes):
            return 0
        gathered = _settle(gm.graph, axis, sharded_calls(gm.graph, axis))
        before = len(gm.graph.nodes)
        _insert(gm.graph, axis, gathered, ctx)
        if axis == "cp":
            _remark_computed_whole(gm.graph, ctx)
        if axis == "dp":
            _remark_gathered_entries(gm.graph, ctx)
            _refuse_draws_together(gm.graph)
        return len(gm.graph.nodes) - before


def _remark_computed_whole(graph: fx.Graph, ctx: Context) -> None:
    """Say which calls without a rule compute everything of what the caller gave, which no rank had split before."""
    inputs = graph.find_nodes(op="placeholder")
    given = {x for x in inputs if not (x.meta.get("state") or x.meta.get("trainable"))}
    for node in graph.nodes:
        if node.op != "call_function" or given.isdisjoint(node.all_input_nodes):
            continue
        given.add(node)
        layout, results = layout_of(node), tensor_results(node)
        if layout is None or layout.call is not None or is_reshard(node) or node.target is operator.getitem:
            continue
        is_whole = not any(is_reshard(value, "cp") for value in node.all_input_nodes)
        if is_whole and any(result.is_floating_point() and result.ndim > 1 for result in results):
            text = f"{node.target} has no sharding rule; every rank computes all of {tuple(results[0].shape)}"
            ctx.remarks.add("SPR102", text, node)


def _gathers_of_entries(graph: fx.Graph) -> list[fx.Node]:
    gathers = (*reshards_of(graph, "dp", "S", "I"), *reshards_of(graph, "dp", "S", "R"))
    return [n for n in gathers if not is_view(operand(n, 0), "dp")]


def _remark_gathered_entries(graph: fx.Graph, ctx: Context) -> None:
    for gather in _gathers_of_entries(graph):
        user = next(iter(gather.users))
        while is_reshard(user):
            user = next(iter(user.users))
        shape = tuple(operand(gather, 0).meta["val"].shape)
        layout = layout_of(user)
        why = "mixes entries of the batch" if layout is None or layout.call is not None else "has no sharding rule"
        text = f"{user.target} {why}: {shape}, of which every rank of dp has its own entries, is gathered over dp"
        ctx.remarks.add("SPR107", text, user if user.op == "call_function" else operand(gather, 0))


def _refuse_draws_together(graph: fx.Graph) -> None:
    """Ranks of dp may have other random states: what each has drawn for all entries is not one value.

    Nor may numbers that each has drawn meet what all have gathered, and go on with alike.
    """
    drawn: set[fx.Node] = set()
    gathered = set(_gathers_of_entries(graph))
    for node in graph.nodes:
        is_draw = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if state_of(node, "dp") != "I":
            continue
        if is_draw or not drawn.isdisjoint(node.all_input_nodes):
            drawn.add(node)
        if not gathered.isdisjoint(node.all_input_nodes):
            gathered.add(node)
        if node in gathered and node in drawn:
            found = f"{node.name}: each rank of dp draws its own random numbers for the entries of all, gathered here"
            raise BatchNotSplit(found, where=source_of(node), legal="random numbers for each entry, or DDP over dp")
    for split in (n for n in reshards_of(graph, "dp", "I", "S") if operand(n, 0) in drawn):
        found = f"{operand(split, 0).name} is drawn for the entries of all ranks together, and each rank draws its own"
        raise BatchNotSplit(found, where=source_of(split), legal="random numbers for each entry, or DDP over dp")


def _settle(graph: fx.Graph, axis: str, sharded: set[fx.Node]) -> set[fx.Node]:
    """Drop the choices and places of everything that runs replicated; inputs stay where they come in parts.

    Returns the calls that could have run sharded: something behind them wants everything.
    """
    could: set[fx.Node] = set()
    for node in graph.nodes:
        layout = layout_of(node)
        if layout is None or is_view(node, axis):
            continue
        source = node.args[0] if node.target is operator.getitem else node
        if source in sharded or (axis == "dp" and OWN in node.meta):
            for number, place in layout.places.get(axis, {}).items():
                show(node, axis, str(place) if number == 0 else node.meta["sharding"][axis])
            continue
        if layout.choice.pop(axis, None) is not None:
            could.add(node)
        layout.places.pop(axis, None)
        show(node, axis, "I")
    return could


def _insert(graph: fx.Graph, axis: str, could: set[fx.Node], ctx: Context) -> None:
    for node in list(graph.nodes):
        if node.op == "output":
            _reshard_outputs(node, axis, ctx)
        elif node.target in READ_SIZES and (axis == "dp" or has_picked_rows(operand(node, 0), axis)):
            continue  # nobody has all entries, but lowering knows how many there are; nobody may ask for picked rows
        elif node.op == "call_function" and node.target is not operator.getitem:
            _reshard_operands(node, axis, could, ctx)
            _complete_sums(node, axis)


def _reshard_operands(node: fx.Node, axis: str, could: set[fx.Node], ctx: Context) -> None:
    layout = layout_of(node)
    runs_sharded = layout is not None and axis in layout.choice
    uses = iter(uses_of(node, axis))

    def convert(operand: fx.Node) -> fx.Node:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            return operand
        state, target = state_of(operand, axis), target_of(next(uses), axis, runs_sharded=runs_sharded)
        if is_view(operand, axis):
            return _read_view(operand, axis, target, node, ctx)
        if (state, target) == ("I", "R"):
            return _vary(operand, axis, node, ctx)
        if state == target:
            return operand
        crosses = state.startswith("S") and target.startswith("S")
        if axis != "dp" and state.startswith("S") and (not runs_sharded or (crosses and axis != "cp")):
            _remark_gather(operand, node, axis, could, ctx)
        return change_state(operand, axis, state, target, origin="insert-reshards")

    node.args = fx.node.map_arg(node.args, convert)
    node.kwargs = fx.node.map_arg(node.kwargs, convert)


def _vary(value: fx.Node, axis: str, user: fx.Node, ctx: Context) -> fx.Node:
    """I -> R, in front of transposes: behind one it would be a copy of a weight, made for each step."""
    if is_view(value, axis):
        return _read_view(value, axis, "R", user, ctx)
    if value.target not in _TRANSPOSES:
        return change_state(value, axis, "I", "R", origin="insert-reshards")
    source = _vary(operand(value, 0), axis, user, ctx)
    for other in source.users:
        if (other.target, other.args[1:], other.kwargs) == (value.target, value.args[1:], value.kwargs):
            return other
    with value.graph.inserting_after(value):
        moved = value.graph.call_function(value.target, (source, *value.args[1:]), value.kwargs)  # type: ignore[arg-type]
    moved.meta = {**value.meta, "sharding": dict(value.meta.get("sharding", {}))}
    show(moved, axis, "R")
    return moved


def _read_view(view: fx.Node, axis: str, target: str, user: fx.Node, ctx: Context) -> fx.Node:
    """A parameter of which ranks hold parts: read as it is, or gathered and, if that is wanted, split otherwise."""
    state = state_of(view, axis)
    if reads_directly(view, axis, target, "contiguous" if axis == "tp" else ctx.order):
        return view
    if axis == "tp":
        text = (
            f"a parameter {tuple(view.meta['val'].shape)} held as {state} is gathered: {user.target} wants it {target}"
        )
        ctx.remarks.add("SPR504", text, user)
    if state == target:  # the same place, but another part of it
        view, state = reshard_to(view, axis, state, "I", origin="insert-reshards"), "I"
    return change_state(view, axis, state, target, origin="insert-reshards")


def _remark_gather(operand: fx.Node, node: fx.Node, axis: str, could: set[fx.Node], ctx: Context) -> None:
    """Say which call wants everything: this one or, if it only comes cheaper in front of it, the first one behind."""
    user: fx.Node | None = node
    while user in could:
        user = next(iter(user.users), None)
    if user is None or user.op != "call_function":
        user = node
    layout = layout_of(user)
    if layout is not None and axis in layout.choice:
        return  # it runs sharded, and wants this operand whole by what it is, as an attention wants document ids
    gathered = f"its operand {tuple(operand.meta['val'].shape)} is gathered"
    op = user.target
    if axis == "tp":
        ctx.remarks.add("SPR501", f"{op} needs what tp has split whole; {gathered}, or becomes rows first", user)
    elif layout is None or layout.call is None:
        ctx.remarks.add("SPR102", f"{op} has no sharding rule; {gathered}", user)
    elif isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags:
        ctx.remarks.add("SPR302", f"{op} draws random numbers for the whole tensor; {gathered}", user)
    else:
        ctx.remarks.add("SPR103", f"{op} mixes positions of the sequence; {gathered}", user)


def _reshard_outputs(output: fx.Node, axis: str, ctx: Context) -> None:
    def convert(value: fx.Node) -> fx.Node:
        if not isinstance(value.meta.get("val"), torch.Tensor):
            return value
        state = state_of(value, axis)
        place = parse_place(state)
        if place is None or _may_stay_split(value, axis, place, ctx):
            return value
        return reshard_to(value, axis, state, "I", origin="insert-reshards")

    output.args = fx.node.map_arg(output.args, convert)


def _may_stay_split(value: fx.Node, axis: str, place: Place, ctx: Context) -> bool:
    """Whether an output in parts is what the user gets: batch entries, and under "sharded" whole dims over cp."""
    layout = layout_of(value)
    assert layout is not None
    if is_view(value, axis):
        return False
    if axis == "dp":  # a DTensor has no word for entries in blocks
        return place.part == 0 or (ctx.options.outputs == "full" and isinstance(blocks_of(value, place), int))
    is_whole_dim = len(leaves(layout.dims[0][place.dim])) == 1
    return axis == "cp" and ctx.options.outputs == "sharded" and is_whole_dim


def _complete_sums(node: fx.Node, axis: str) -> None:
    """A call that reduced its sharded factor gives pending sums: complete them at once."""
    layout = layout_of(node)
    if layout is None or layout.call is None or axis not in layout.choice:
        return
    if leaves_sums(layout.call, layout.choice[axis]):
        hand_over(node, axis, "P", origin="insert-reshards")


def _attention_with_running_maximum(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    h_B1SD = (x_BSD @ w_DD).unsqueeze(1)
    y_B1SD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD)
    return (y_B1SD * y_B1SD.logcumsumexp(2)).sum()


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 4), (4, 4)))


EXAMPLE = {"dp": LOSS_OF_ENTRIES, "cp": Example(_attention_with_running_maximum, _inputs), "tp": MLP}
