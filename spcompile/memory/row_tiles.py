"""Parts of a graph that work row by row on wide values: found from products and shapes, never from names.

A product that widens its rows, as the first of an MLP, starts a part. To it belong the elementwise calls on values as
wide, and other products that make such values, as of the gate. Products that read them end it: those back to narrow
rows, and those that sum over all rows, which give gradients of weights. Such a part can run over tiles of rows: then
no wide value stands whole. Rows are what all leading dims hold together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

aten = torch.ops.aten
TILES = "spx_tiles"  # in the meta of the output of a graph: into how many tiles its plan cuts rows
_RENAMES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default, aten.detach.default}
# Gradients of elementwise calls, of which torch tags none (2.13).
_ELEMENTWISE = {
    aten._to_copy,
    aten.elu_backward,
    aten.gelu_backward,
    aten.hardsigmoid_backward,
    aten.hardswish_backward,
    aten.hardtanh_backward,
    aten.leaky_relu_backward,
    aten.mish_backward,
    aten.native_dropout_backward,
    aten.sigmoid_backward,
    aten.silu_backward,
    aten.softplus_backward,
    aten.tanh_backward,
    aten.threshold_backward,
}
_TURNS = {aten.t.default, aten.transpose.int, aten.permute.default}
_PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}  # -> which argument has the rows


@dataclass(frozen=True)
class WidePart:
    """rows, width: of its values. inner: the calls that make them, in order. whole: those that others read as well.

    narrow: products of inner values, [rows, anything]. sums: what is summed over rows. turns: transposes of inner
    values that only sums read.
    """

    rows: int
    width: int
    inner: tuple[fx.Node, ...]
    whole: frozenset[fx.Node]
    narrow: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
    turns: tuple[fx.Node, ...]

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        """All calls of the part."""
        return (*self.inner, *self.narrow, *self.sums, *self.turns)

    @property
    def tiled_away(self) -> frozenset[fx.Node]:
        """The values that never stand whole where the part runs over tiles."""
        return frozenset(self.inner) - self.whole

    @property
    def products(self) -> list[fx.Node]:
        """The products of the part."""
        return [node for node in self.calls if node.target in _PRODUCTS]


def find_wide_parts(order: Sequence[fx.Node], kept: Callable[[fx.Node], bool]) -> list[WidePart]:
    """Of the calls of a graph, in their order. kept: says of a value whether it must stand whole, as what is saved."""
    return WidePartFinder().find(order, kept)


class WidePartFinder:
    """Finds wide parts in orders of the calls of one graph, which does not change in between."""

    def __init__(self) -> None:
        self._made_rows: dict[fx.Node, tuple[int, int] | None] = {}
        self._widening: dict[fx.Node, bool] = {}

    def find(self, order: Sequence[fx.Node], kept: Callable[[fx.Node], bool]) -> list[WidePart]:
        """`find_wide_parts`."""
        place = {node: at for at, node in enumerate(order)}
        found: list[WidePart] = []
        seen: set[fx.Node] = set()
        taken: set[fx.Node] = set()
        for node in order:
            if node.target in _PRODUCTS and node not in seen and self._widens(node):
                part = self._part(node, place, kept)
                seen.update(part.inner)
                if _is_worth_it(part) and taken.isdisjoint(part.calls):
                    taken.update(part.calls)
                    found.append(part)
        return found

    def _widens(self, node: fx.Node) -> bool:
        if node not in self._widening:
            self._widening[node] = _widens_rows(node)
        return self._widening[node]

    def _rows_made(self, node: fx.Node) -> tuple[int, int] | None:
        """Of a call each row of whose value follows from the same rows of operands."""
        if node not in self._made_rows:
            shape = rows_and_width(node)
            self._made_rows[node] = shape if shape is not None and _makes_rows(node, shape) else None
        return self._made_rows[node]

    def _part(self, start: fx.Node, place: Mapping[fx.Node, int], kept: Callable[[fx.Node], bool]) -> WidePart:
        shape = rows_and_width(start)
        assert shape is not None
        inner, pending = {start}, [start]
        while pending:
            node = pending.pop()
            for other in (*node.users, *node.all_input_nodes):
                if other not in inner and other in place and self._rows_made(other) == shape:
                    inner.add(other)
                    pending.append(other)
        narrow: dict[fx.Node, None] = {}
        sums: dict[fx.Node, None] = {}
        turns: dict[fx.Node, None] = {}
        whole = {node for node in inner if kept(node) or any(user.op == "output" for user in node.users)}
        for node in inner:
            for reader in node.users:
                if reader in inner or reader not in place:
                    continue
                last = [user for user in reader.users if user in place]
                if _narrows_rows(reader, inner, shape[0]):
                    narrow[reader] = None
                elif _sums_rows(reader, shape[0]):
                    sums[reader] = None
                elif turned(reader) is not None and all(_sums_rows(user, shape[0]) for user in last):
                    sums.update(dict.fromkeys(last))
                    turns[reader] = None
                else:
                    whole.add(node)
        inside, *others = (tuple(sorted(nodes, key=place.__getitem__)) for nodes in (inner, narrow, sums, turns))
        return WidePart(*shape, inside, frozenset(whole), *others)


def _is_worth_it(part: WidePart) -> bool:
    """Whether most of its values need not stand whole, and are wider than what products read and give beside them."""
    inner = set(part.inner)
    products = [product_rows(node) for node in part.inner if node.target in _PRODUCTS]
    beside = [shape for node in (*products, *part.narrow) if node not in inner and (shape := rows_and_width(node))]
    return len(part.tiled_away) > len(part.whole) and all(width < part.width for _, width in beside)


def rows_and_width(node: object) -> tuple[int, int] | None:
    """Of a value of at least two dims, none of which is a symbol."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or not all(isinstance(size, int) for size in value.shape):
        return None
    width = int(value.shape[-1])
    return (value.numel() // width, width) if value.numel() else None


def product_rows(node: fx.Node) -> fx.Node:
    """The operand of a product that has the rows."""
    found = node.args[_PRODUCTS[node.target]]  # type: ignore[index]
    assert isinstance(found, fx.Node)
    return found


def turned(node: object) -> fx.Node | None:
    """The matrix of which this is the transpose."""
    if not isinstance(node, fx.Node) or node.target not in _TURNS:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value, own = source.meta["val"], node.meta["val"]
    is_matrix = value.ndim == 2 and tuple(own.shape) == tuple(value.shape)[::-1] and own.stride() != value.stride()
    return source if is_matrix else None


def renames_rows(node: fx.Node) -> bool:
    """Whether a call gives the rows of its operand other leading dims."""
    return node.target in _RENAMES and rows_and_width(node.args[0]) == rows_and_width(node)


def sums_in_float32(node: fx.Node) -> bool:
    """Whether a sum over tiles is taken in a wider type than its value has."""
    return node.meta["val"].dtype in (torch.float16, torch.bfloat16)


def _widens_rows(node: fx.Node) -> bool:
    """Whether this is a product of rows with a matrix that makes them wider."""
    shape = rows_and_width(node)
    if shape is None or node.target not in _PRODUCTS or turned(product_rows(node)) is not None:
        return False
    given = rows_and_width(product_rows(node))
    return given is not None and given[0] == shape[0] > 1 and given[1] < shape[1]


def _makes_rows(node: fx.Node, shape: tuple[int, int]) -> bool:
    """Whether each row of a value follows from the same rows of operands."""
    if node.target in _PRODUCTS:
        rows = product_rows(node)
        given = rows_and_width(rows)
        return turned(rows) is None and given is not None and given[0] == shape[0]
    if renames_rows(node):
        return True
    tags, packet = getattr(node.target, "tags", ()), getattr(node.target, "overloadpacket", None)
    if torch.Tag.pointwise not in tags and packet not in _ELEMENTWISE:
        return False
    return all(_fits_rows(operand, node) for operand in node.all_input_nodes)


def _fits_rows(operand: fx.Node, node: fx.Node) -> bool:
    """Whether an operand of an elementwise call has its rows, a number for each, or nothing that depends on rows."""
    value, own = operand.meta.get("val"), node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return True
    leading = tuple(value.shape[:-1])
    if all(size == 1 for size in leading):
        return True
    return leading == tuple(own.shape[:-1]) and value.shape[-1] in (1, own.shape[-1])


def _narrows_rows(node: fx.Node, inner: Collection[fx.Node], rows: int) -> bool:
    """Whether this is a product of inner rows with a matrix that all rows share."""
    if node.target not in _PRODUCTS or product_rows(node) not in inner:
        return False
    shape = rows_and_width(node)
    others = [operand for operand in node.all_input_nodes if operand is not product_rows(node)]
    return shape is not None and shape[0] == rows and not any(operand in inner for operand in others)


def _sums_rows(node: fx.Node, rows: int) -> bool:
    """Whether this is the product of a transpose with rows, or the sum of all rows."""
    if node.target is aten.mm.default:
        left, right = turned(node.args[0]), rows_and_width(node.args[1])
        shape = rows_and_width(left)
        return shape is not None and right is not None and shape[0] == rows == right[0]
    if node.target is aten.sum.dim_IntList:
        value = node.args[0].meta["val"]  # type: ignore[union-attr]
        dims = sorted(dim % value.ndim for dim in node.args[1])  # type: ignore[union-attr]
        return dims == list(range(value.ndim - 1)) and node.kwargs.get("dtype") is None
    return False
