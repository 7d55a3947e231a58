"""What annotation leaves on the nodes of a GLOBAL graph: `meta["layout"]`, read by `insert-reshards` and `lower`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch.fx as fx

from spcompile.diagnostics import InvalidGraph, source_of
from spcompile.graph.edit import is_getitem, operand, result_number
from spcompile.graph.reshard import Place
from spcompile.graph.sizes import same
from spcompile.sharding.global_view import is_view, place_of_view
from spcompile.sharding.index_spaces import Dims, IndexSpaces, OpSpaces
from spcompile.sharding.propagate import Choice, Placements, place_of
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.spaces import leaves


@dataclass
class NodeLayout:
    """One node's spaces and placements.

    dims: for every tensor result, the product of spaces of every dim.
    call: rule and factor spaces, for a call that has a rule.
    choice: per mesh axis, the factor over which the call runs sharded.
    places: per mesh axis and result number, where the value is split (absent: replicated).
    partial: the axes on which the call, which is linear, reads and gives parts of sums.
    forced: a call that has a choice runs sharded, whatever it costs.
    picked: the axes on which each rank has as many rows as it picked of the indices of the dim that is split.
    """

    dims: list[Dims]
    call: OpSpaces | None = None
    choice: dict[str, Choice] = field(default_factory=dict)
    places: dict[str, dict[int, Place]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    forced: bool = False
    picked: set[str] = field(default_factory=set)

    def place(self, axis: str, result: int = 0) -> Place | None:
        """Where a result is split on `axis`."""
        return self.places.get(axis, {}).get(result)


def layout_of(node: fx.Node) -> NodeLayout | None:
    """The layout of a node; None for nodes without tensor results."""
    return node.meta.get("layout")


def has_picked_rows(node: fx.Node, axis: str) -> bool:
    """Whether a value is split in a dim of which each rank has as many rows as it picked (`sharding/shuffles.py`)."""
    layout = layout_of(node)
    return layout is not None and axis in layout.picked


def show(node: fx.Node, axis: str, state: str) -> None:
    """Record a state for the printed graph."""
    node.meta.setdefault("sharding", {})[axis] = state


def annotate(graph: fx.Graph, axis: str, spaces: IndexSpaces, placements: Placements) -> None:
    """Leave on every node a new layout: its spaces, and on `axis` its choice and places.

    A global view on `axis` is no call to be placed: its result is split as it says.

    Raises:
        InvalidGraph: a value is placed where the call that makes it does not put it; a bug of whoever placed it.
    """
    for node in graph.nodes:
        node.meta.pop("layout", None)
        node.meta["sharding"] = {k: v for k, v in node.meta.get("sharding", {}).items() if k != axis}
        if node in spaces.values:
            node.meta["layout"] = _layout(node, axis, spaces, placements)
            _require_place_of_call(node, axis)


def _require_place_of_call(node: fx.Node, axis: str) -> None:
    source, number = (operand(node, 0), result_number(node)) if is_getitem(node) else (node, 0)
    layout, made = layout_of(node), layout_of(source)
    if layout is None or made is None or made.call is None or axis not in made.choice:
        return
    wanted = place_of(made.call.rule.results[number], made.call, made.choice[axis])
    if layout.place(axis) != wanted:
        found = f"{node.name} is placed at {layout.place(axis)} on {axis}, but {source.target} puts it at {wanted}"
        raise InvalidGraph(found, where=source_of(node), legal="the place that follows from the choice of the call")


def _layout(node: fx.Node, axis: str, spaces: IndexSpaces, placements: Placements) -> NodeLayout:
    dims = spaces.values[node]
    if is_view(node, axis):
        held = place_of_view(node)
        show(node, axis, str(held))
        return NodeLayout(dims, places={axis: {0: held}})
    layout = NodeLayout(dims, spaces.calls.get(node), forced=node in placements.forced)
    if node in placements.choices:
        layout.choice[axis] = placements.choices[node]
    for number in range(len(dims)):
        place = placements.places.get((node, number))
        if place is not None:
            layout.places.setdefault(axis, {})[number] = place
            show(node, axis, str(place))
            indices = math.prod(space.size for space in leaves(dims[number][place.dim]))
            if not same(indices, tensor_results(node)[number].shape[place.dim]):
                layout.picked.add(axis)
    return layout
