"""Edits of a GLOBAL graph with layouts: change the state of one value, or let one more call run sharded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.reshard import Place, Reshard, is_reshard, parse_place, reshard
from spcompile.graph.sizes import divides, same
from spcompile.sharding.global_view import part_of_view
from spcompile.sharding.layout import NodeLayout, layout_of, show
from spcompile.sharding.propagate import Choice, follow_prefix, place_of, space_at
from spcompile.sharding.sharded_or_replicated import Use, uses_of
from spcompile.sharding.spaces import Space, leaves


def state_of(value: fx.Node, axis: str) -> str:
    """The state of a value on one axis: "S(d.k)" or "I"; for a reshard the one it leads to."""
    if is_reshard(value, axis):
        return Reshard.of(value).dst
    layout = layout_of(value)
    place = layout.place(axis) if layout is not None else None
    return str(place) if place is not None else "I"


def blocks_of(value: fx.Node, place: Place) -> Any:
    """How many indices stand in front of the factor of a dim that is split."""
    layout = layout_of(value)
    assert layout is not None
    return math.prod(space.size for space in leaves(layout.dims[0][place.dim])[: place.part])


# The last two: a checkpointed region keeps no more of what changes layout in it than of the rest.
_LIKE_THE_VALUE = ("val", "stack_trace", "nn_module_stack", "recompute", "ac_graph_id")


def reshards_of(graph: fx.Graph, axis: str, src: str, dst: str) -> list[fx.Node]:
    """All reshards on `axis` between two states; "S" stands for any split."""
    return [n for n in graph.nodes if is_reshard(n, axis) and Reshard.of(n).kinds == (src, dst)]


def reshard_to(value: fx.Node, axis: str, src: str, dst: str, *, origin: str) -> fx.Node:
    """The reshard of a value to a state: the one there is, or a new one right behind the value's producer."""
    for user in value.users:
        if is_reshard(user) and Reshard.of(user) == Reshard(value, axis, src, dst):
            return user
    graph = value.graph
    with graph.inserting_before(_behind_inputs(graph)) if value.op == "placeholder" else graph.inserting_after(value):
        node = graph.call_function(reshard, (value, axis, src, dst))
    source = layout_of(value)
    assert source is not None
    place = parse_place(dst)
    node.meta = {
        k: value.meta[k]
        for k in ("val", "stack_trace", "nn_module_stack", "recompute", "ac_graph_id")
        if k in value.meta
    }
    node.meta["layout"] = NodeLayout(source.dims, places={axis: {0: place}} if place else {})
    node.meta["spx_origin"] = f"{origin}: {value.name}"
    show(node, axis, dst)
    return node


def change_state(value: fx.Node, axis: str, src: str, dst: str, *, origin: str) -> fx.Node:
    """`reshard_to`; between two splits in two steps but on `cp`, where an all-to-all takes one to the other."""
    if axis != "cp" and src.startswith("S") and dst.startswith("S"):
        value, src = reshard_to(value, axis, src, "I", origin=origin), "I"
    return reshard_to(value, axis, src, dst, origin=origin)


def _behind_inputs(graph: fx.Graph) -> fx.Node:
    """The first node behind the placeholders and the reshards of them."""
    inputs = (n for n in graph.nodes if n.op != "placeholder")
    return next(n for n in inputs if not is_reshard(n) or Reshard.of(n).x.op != "placeholder")


def target_of(use: Use, axis: str, *, runs_sharded: bool) -> str:
    """The state in which a call reads an operand; its present one where that will do."""
    state = state_of(use.value, axis)
    target = str(use.place) if use.place is not None else "R" if runs_sharded else "I"
    no_gradient = not takes_gradient(use.value.meta["val"])
    return state if use.unread or (state == "I" and target == "R" and no_gradient) else target


def reads_directly(view: fx.Node, axis: str, target: str, order: str) -> bool:
    """Whether the part of a global view that a rank holds is the part it has in state `target` on `axis`.

    A view's parts are even, contiguous and not padded; those of a value whose layout is `order` may be otherwise.
    """
    if state_of(view, axis) != target or order != "contiguous":
        return False
    layout, place = layout_of(view), parse_place(target)
    assert layout is not None
    assert place is not None
    space = space_at(layout.dims[0], place)
    return same(space.family().size, space.find().size) and divides(part_of_view(view).degree, space.find().size)


def run_sharded(node: fx.Node, axis: str, choice: Choice, *, origin: str) -> None:
    """Let a replicated call run over a split factor. Its results' users still expect them whole."""
    layout = layout_of(node)
    assert layout is not None
    assert layout.call is not None
    follow_prefix(layout.call, choice)
    layout.choice[axis] = choice
    uses = iter(uses_of(node, axis))

    def given(read: fx.Node) -> fx.Node:
        if not isinstance(read.meta.get("val"), torch.Tensor):
            return read
        state, target = state_of(read, axis), target_of(next(uses), axis, runs_sharded=True)
        return read if state == target else change_state(read, axis, state, target, origin=origin)

    node.args = fx.node.map_arg(node.args, given)
    node.kwargs = fx.node.map_arg(node.kwargs, given)
    for number, dims in enumerate(layout.call.rule.results):
        place = place_of(dims, layout.call, choice)
        if place is not None:
            layout.places.setdefault(axis, {})[number] = place


def hand_over(value: fx.Node, axis: str, src: str, *, origin: str) -> fx.Node:
    """Give the users that `value` has now, all of which expect it whole, its reshard src -> I."""
    users = list(value.users)
    show(value, axis, src)
    whole = reshard_to(value, axis, src, "I", origin=origin)
    for user in users:
        if user is not whole:
            user.replace_input_with(value, whole)
    return whole


def families_of_sequences(graph: fx.Graph) -> set[Space]:
    """The sequences of a graph with layouts, as axis `tp` has marked them."""
    layouts = (layout for n in graph.nodes if (layout := layout_of(n)) is not None)
    spaces = (space.family() for layout in layouts for dims in layout.dims for dim in dims for space in leaves(dim))
    return {space for space in spaces if space.is_sequence}


def sequence_place(value: fx.Node, sequences: Iterable[Space]) -> str | None:
    """The state "S(d.k)" that splits a value over a sequence; None if it has none."""
    layout = layout_of(value)
    assert layout is not None
    wanted = set(sequences)
    for dim, spaces in enumerate(layout.dims[0]):
        for part, space in enumerate(leaves(spaces)):
            if space.family() in wanted:
                return f"S({dim})" if part == 0 else f"S({dim}.{part})"
    return None
