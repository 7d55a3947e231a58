"""tile-rows: what works row by row on wide values, as an MLP between two norms, runs over tiles of rows.

Before   up: "f64[8, 16]" = aten.mm(x, w)          After    x_1 = aten.slice(x, 0, 0, 4)
         sin: "f64[8, 16]" = aten.sin(up)                   up_1: "f64[4, 16]" = aten.mm(x_1, w)
         down: "f64[8, 4]" = aten.mm(sin, v)                sin_1: "f64[4, 16]" = aten.sin(up_1)
                                                            down_1: "f64[4, 4]" = aten.mm(sin_1, v)
                                                            ...                                       # rows 4 to 8
                                                            down: "f64[8, 4]" = aten.cat([down_1, down_2])

Forward and backward alike, so that no wide value stands whole; gradients of weights are sums over tiles, in float32 at
least. A plan of memory asks for it where that is what a step needs to fit. Which parts of a graph those are is in
`spcompile/memory/row_tiles.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import call
from spcompile.graph.storage import root_of
from spcompile.memory.row_tiles import (
    TILES,
    WidePart,
    find_wide_parts,
    product_rows,
    renames_rows,
    rows_and_width,
    sums_in_float32,
    turned,
)
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.node_roles import side_effects

aten = torch.ops.aten


@dataclass(frozen=True)
class TileRows(Pass):
    """Cut wide parts into tiles of rows.

    tiles: how many; 0: as the plan of memory says, which is none where a step fits without.
    """

    name: ClassVar[str] = "tile-rows"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    summary: ClassVar[str] = "wide row-wise parts run over tiles of rows"

    tiles: int = 0

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite all parts; returns how many."""
        graph, output = gm.graph, gm.graph.output_node()
        tiles = self.tiles or output.meta.get(TILES, 1)
        if tiles < 2:
            return 0
        parts = _put_together(graph, tiles)
        read = {value for part in parts for node in part.calls for value in node.all_input_nodes}
        for part in parts:
            _Tiles(part, tiles).write()
        _erase_unread_views(read)
        return len(parts)


def _erase_unread_views(values: Iterable[fx.Node]) -> None:
    """Transposes that only parts have read: each of them would keep its value until the end."""
    pending = sorted((value for value in values if not value._erased), reverse=True)
    while pending:
        value = pending.pop()
        if not value._erased and not value.users and root_of(value) is not value:
            pending += value.all_input_nodes
            value.graph.erase_node(value)


def _is_tiled(part: WidePart, tiles: int) -> bool:
    """Whether a part works on rows that were cut out by this pass."""
    return any(product_rows(node).meta.get("spx_tile") for node in part.products)


def _put_together(graph: fx.Graph, tiles: int) -> list[WidePart]:
    """Order the graph so that the calls of each part stand behind one another; returns the parts."""
    stuck: set[fx.Node] = set()
    while True:
        calls = [node for node in graph.nodes if node.op == "call_function"]
        found = [part for part in find_wide_parts(calls, lambda node: False) if not _is_tiled(part, tiles)]
        found = [part for part in found if part.rows >= tiles and part.inner[0] not in stuck]
        order, on_circle = _order_of_units(graph, found)
        if on_circle is None:
            break
        if not _make_results_apart(graph, on_circle):
            stuck.add(on_circle.inner[0])
    output = graph.output_node()
    for node in order:
        output.prepend(node)
    return found


def _make_results_apart(graph: fx.Graph, part: WidePart) -> bool:
    """Make the narrow results of a part that the part itself waits for from copies of its calls.

    So it is where the backward makes a block again whose output it reads before it comes to the block's own gradient.
    Tiles of both cannot be the same ones. Returns whether there are such results.
    """
    calls = set(part.calls)
    before: set[fx.Node] = set()
    pending = [value for node in calls for value in node.all_input_nodes if value not in calls]
    while pending:
        node = pending.pop()
        if node not in before:
            before.add(node)
            pending += node.all_input_nodes
    results = [node for node in part.narrow if node in before]
    wanted: set[fx.Node] = set()
    pending = [value for node in results for value in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in part.inner and node not in wanted:
            wanted.add(node)
            pending += node.all_input_nodes
    copies: dict[fx.Node, fx.Node] = {}
    for node in sorted(wanted):
        with graph.inserting_before(min(results)):
            copies[node] = graph.node_copy(node, lambda value: copies.get(value, value))
            copies[node].meta = dict(node.meta)
    for result in results:
        for value in result.all_input_nodes:
            if value in copies:
                result.replace_input_with(value, copies[value])
    return bool(results)


def _order_of_units(graph: fx.Graph, parts: Sequence[WidePart]) -> tuple[list[fx.Node], WidePart | None]:
    """(all nodes but the output, with each part as one, as near to their order as can be; the first on a circle)."""
    place = {node: at for at, node in enumerate(graph.nodes) if node.op != "output"}
    unit = {node: node for node in place} | {node: part.inner[0] for part in parts for node in part.calls}
    members: dict[fx.Node, list[fx.Node]] = {}
    effects = side_effects(place)
    for node in place:
        members.setdefault(unit[node], []).append(node)
    after: dict[fx.Node, set[fx.Node]] = {first: set() for first in members}
    for node in place:
        for value in (*node.all_input_nodes, *effects.get(node, ())):
            if unit[value] is not unit[node]:
                after[unit[value]].add(unit[node])
    missing = dict.fromkeys(members, 0)
    for units in after.values():
        for other in units:
            missing[other] += 1
    ready = [(place[first], first) for first, count in missing.items() if not count]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    while ready:
        _, first = heapq.heappop(ready)
        done.add(first)
        order.extend(members[first])
        for other in after[first]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(ready, (place[other], other))
    return order, _first_on_circle(parts, {first: units for first, units in after.items() if first not in done})


def _first_on_circle(parts: Sequence[WidePart], after: Mapping[fx.Node, Collection[fx.Node]]) -> WidePart | None:
    """The first part that some circle of units leads to and that leads to one. after: of units that wait for one."""
    before: dict[fx.Node, list[fx.Node]] = {first: [] for first in after}
    for first, units in after.items():
        for other in units:
            before[other].append(first)
    leads_to = {first: len(units) for first, units in after.items()}
    ends = [first for first, count in leads_to.items() if not count]
    while ends:
        for other in before[ends.pop()]:
            leads_to[other] -= 1
            if not leads_to[other]:
                ends.append(other)
    return next((part for part in parts if leads_to.get(part.inner[0])), None)


class _Tiles:
    """Writes the tiles of one part, behind one another, in place of its calls."""

    def __init__(self, part: WidePart, tiles: int) -> None:
        self.part = part
        self.graph = part.inner[0].graph
        self.before = max(part.calls).next
        step = -(-part.rows // tiles)
        self.bounds = [(start, min(start + step, part.rows)) for start in range(0, part.rows, step)]
        self.written: list[fx.Node] = []
        self.flat: dict[fx.Node, fx.Node] = {}  # value of rows -> the same as a matrix

    def write(self) -> None:
        part = self.part
        ends = sorted({*part.whole, *part.narrow})
        pieces: dict[fx.Node, list[fx.Node]] = {node: [] for node in ends}
        totals: dict[fx.Node, fx.Node] = {}
        for bounds in self.bounds:
            tile: dict[fx.Node, fx.Node] = {}
            for node in sorted((*part.inner, *part.narrow, *part.sums)):
                if node in part.sums:
                    totals[node] = self._with(totals.get(node), node, tile, bounds)
                    continue
                tile[node] = self._row_by_row(node, tile, bounds)
                if node in pieces:
                    pieces[node].append(tile[node])
        results = {node: self._joined(node, rows) for node, rows in pieces.items()}
        results |= {node: self._total(node, total) for node, total in totals.items()}
        for node, result in results.items():
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in part.calls)
        for node in (*sorted(part.calls, reverse=True), *reversed(self.written)):
            if not node.users:
                self.graph.erase_node(node)

    def _call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = call(self.graph, target, args, kwargs, like=like, before=self.before)
        node.meta.setdefault("spx_origin", "tile-rows")
        self.written.append(node)
        return node

    def _row_by_row(self, node: fx.Node, tile: Mapping[fx.Node, fx.Node], bounds: tuple[int, int]) -> fx.Node:
        if renames_rows(node):
            return self._operand(node.all_input_nodes[0], tile, bounds)
        rows = {product_rows(node)} if node in self.part.products else set(node.all_input_nodes)

        def operand(value: fx.Node) -> fx.Node:
            return self._operand(value, tile, bounds) if value in rows else value

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        return self._call(node, node.target, *args, **kwargs)

    def _operand(self, value: fx.Node, tile: Mapping[fx.Node, fx.Node], bounds: tuple[int, int]) -> fx.Node:
        """The rows of a value that are in the tile; the value itself where it has none."""
        if value in tile:
            return tile[value]
        shape = rows_and_width(value)
        example = value.meta.get("val")
        if shape is None or shape[0] != self.part.rows:
            if isinstance(example, Tensor) and example.ndim > 1:
                return self._flat(value, [example.shape[-1]])
            return value
        cut = self._call(value, aten.slice.Tensor, self._flat(value, list(shape)), 0, *bounds)
        cut.meta["spx_tile"] = True
        return cut

    def _flat(self, value: fx.Node, shape: list[int]) -> fx.Node:
        if list(value.meta["val"].shape) == shape:
            return value
        if value not in self.flat:
            self.flat[value] = self._call(value, aten.reshape.default, value, shape)
        return self.flat[value]

    def _with(
        self, total: fx.Node | None, node: fx.Node, tile: Mapping[fx.Node, fx.Node], bounds: tuple[int, int]
    ) -> fx.Node:
        """A sum over rows with those of one tile more.

        A product adds to what is there as it is computed: of separate sums a compiler would make few kernels, for which
        the products of many tiles stand side by side.
        """
        if node.target is aten.sum.dim_IntList:
            more = self._call(node, node.target, self._operand(node.all_input_nodes[0], tile, bounds), [0])
        else:
            left, right = turned(node.args[0]), node.args[1]
            assert left is not None
            assert isinstance(right, fx.Node)
            left = self._call(node, aten.t.default, self._operand(left, tile, bounds))
            right = self._operand(right, tile, bounds)
            if total is not None and total.meta["val"].dtype == node.meta["val"].dtype:
                return self._call(node, aten.addmm.default, total, left, right)
            more = self._call(node, node.target, left, right)
        if total is not None:
            return self._call(node, aten.add.Tensor, total, more)
        if sums_in_float32(node):
            return self._call(node, aten._to_copy.default, more, dtype=torch.float32)
        return more

    def _joined(self, node: fx.Node, rows: Iterable[fx.Node]) -> fx.Node:
        return self._as_before(node, self._call(node, aten.cat.default, list(rows)))

    def _total(self, node: fx.Node, total: fx.Node) -> fx.Node:
        if total.meta["val"].dtype != node.meta["val"].dtype:
            total = self._call(node, aten._to_copy.default, total, dtype=node.meta["val"].dtype)
        return self._as_before(node, total)

    def _as_before(self, node: fx.Node, value: fx.Node) -> fx.Node:
        shape = list(node.meta["val"].shape)
        return value if list(value.meta["val"].shape) == shape else self._call(node, aten.view.default, value, shape)


def _residual_mlp(x_SD: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    return (x_SD + (x_SD @ up_DF).sin() @ down_FD).square().mean()


def _inputs() -> tuple[Tensor, ...]:
    shapes = ((7, 4), (4, 16), (16, 4))
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


EXAMPLE = Example(_residual_mlp, _inputs, fields={"tiles": 2})
