"""insert-reshards: make every change of a value's state an explicit node.

Before: calls that want a value in different states read the same node. After: every call reads its operands in the
state it wants, through `reshard(x, axis, src, dst)`; which calls run sharded is a minimum cut over bytes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.cut import sharded_calls, uses_of
from spcompile.layout import NodeLayout, layout_of, show
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.propagate import shards_results
from spcompile.reshard import is_reshard, parse_place, reshard

Made = dict[tuple[fx.Node, str, str], fx.Node]  # (value, from state, to state) -> its reshard


@dataclass(frozen=True)
class InsertReshards(Pass):
    """Decide which calls run sharded, then insert one reshard per value and state wanted."""

    name: ClassVar[str] = "insert-reshards"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"annotate-sharding"})
    summary: ClassVar[str] = "decides by a minimum cut which calls run sharded, and makes every reshard a node"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Insert the reshards of axis `cp`; returns how many."""
        if any(is_reshard(n) for n in gm.graph.nodes):
            return 0
        sharded = sharded_calls(gm.graph, "cp")
        _settle(gm.graph, "cp", sharded)
        count = _insert(gm.graph, "cp", ctx)
        gm.recompile()
        return count


def _settle(graph: fx.Graph, axis: str, sharded: set[fx.Node]) -> None:
    """Drop the choices and places of everything that runs replicated."""
    for node in graph.nodes:
        layout = layout_of(node)
        if layout is None:
            continue
        source = node.args[0] if node.target is operator.getitem else node
        if source in sharded:
            for number, place in layout.places.get(axis, {}).items():
                show(node, axis, str(place) if number == 0 else node.meta["sharding"][axis])
            continue
        layout.choice.pop(axis, None)
        layout.places.pop(axis, None)
        show(node, axis, "I")


def _insert(graph: fx.Graph, axis: str, ctx: Context) -> int:
    made: Made = {}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "output":
            _reshard_outputs(node, axis, made, first, ctx)
        elif node.op == "call_function" and node.target is not operator.getitem:
            _reshard_operands(node, axis, made, first, ctx)
            _complete_sums(node, axis, made, first)
    return len(made)


def _reshard_operands(node: fx.Node, axis: str, made: Made, first: fx.Node, ctx: Context) -> None:
    layout = layout_of(node)
    runs_sharded = layout is not None and axis in layout.choice
    wanted = iter(uses_of(node, axis))

    def convert(operand: fx.Node) -> fx.Node:
        if not isinstance(operand.meta.get("val"), torch.Tensor):
            return operand
        use = next(wanted)
        if use.unread:
            return operand
        place = use.place
        state = state_of(operand, axis)
        target = str(place) if place is not None else "R" if runs_sharded else "I"
        if state == target or (state == "I" and target == "R" and not operand.meta["val"].is_floating_point()):
            return operand
        if state.startswith("S") and not runs_sharded:
            _remark_gather(operand, node, layout, ctx)
        return _reshard(operand, axis, state, target, made, first)

    node.args = fx.node.map_arg(node.args, convert)
    node.kwargs = fx.node.map_arg(node.kwargs, convert)


def _remark_gather(operand: fx.Node, user: fx.Node, layout: NodeLayout | None, ctx: Context) -> None:
    gathered = f"its operand {tuple(operand.meta['val'].shape)} is gathered"
    op = user.target
    if layout is None or layout.call is None:
        ctx.remarks.add("SPR102", f"{op} has no sharding rule; {gathered}", user)
    elif isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags:
        ctx.remarks.add("SPR302", f"{op} draws random numbers for the whole tensor; {gathered}", user)
    else:
        ctx.remarks.add("SPR103", f"{op} mixes positions of the sequence; {gathered}", user)


def _reshard_outputs(output: fx.Node, axis: str, made: Made, first: fx.Node, ctx: Context) -> None:
    def convert(value: fx.Node) -> fx.Node:
        if not isinstance(value.meta.get("val"), torch.Tensor):
            return value
        state = state_of(value, axis)
        if not state.startswith("S") or ctx.options.outputs == "sharded":
            return value
        return _reshard(value, axis, state, "I", made, first)

    output.args = fx.node.map_arg(output.args, convert)


def _complete_sums(node: fx.Node, axis: str, made: Made, first: fx.Node) -> None:
    """A call that reduced its sharded factor gives pending sums: complete them at once."""
    layout = layout_of(node)
    if layout is None or layout.call is None or axis not in layout.choice:
        return
    if shards_results(layout.call, layout.choice[axis]):
        return
    users = list(node.users)
    show(node, axis, "P")
    total = _reshard(node, axis, "P", "I", made, first)
    for user in users:
        user.replace_input_with(node, total)


def state_of(value: fx.Node, axis: str) -> str:
    """The state of a value on one axis."""
    layout = layout_of(value)
    place = layout.place(axis) if layout is not None else None
    return str(place) if place is not None else "I"


def _reshard(value: fx.Node, axis: str, src: str, dst: str, made: Made, first: fx.Node) -> fx.Node:
    """The reshard of a value to a state, made once and placed right behind the value's producer."""
    key = (value, src, dst)
    if key in made:
        return made[key]
    graph = value.graph
    with graph.inserting_before(first) if value.op == "placeholder" else graph.inserting_after(value):
        node = graph.call_function(reshard, (value, axis, src, dst))
    source = layout_of(value)
    assert source is not None
    place = parse_place(dst)
    node.meta = {k: value.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in value.meta}
    node.meta["layout"] = NodeLayout(source.dims, places={axis: {0: place}} if place else {})
    node.meta["spx_origin"] = f"insert-reshards: {value.name}"
    show(node, axis, dst)
    made[key] = node
    return node


def _attention_with_running_sum(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    h_B1SD = (x_BSD @ w_DD).unsqueeze(1)
    y_B1SD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD)
    return (y_B1SD * y_B1SD.cumsum(2)).sum()


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 4), (4, 4)))


EXAMPLE = Example(_attention_with_running_sum, _inputs)
