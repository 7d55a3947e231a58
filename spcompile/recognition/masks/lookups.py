"""Reads ops whose elements depend on where they stand: counters, triangles, differences along a dim, indexing."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.fx as fx

from spcompile.graph.edit import argument, shape_of
from spcompile.recognition.masks.index_maps import Indices, from_end, size_expr, sizes_of
from spcompile.recognition.masks.reader import Reader, as_dtype, reads, stop
from spcompile.recognition.masks.values import (
    Unreadable,
    Value,
    at_least_zero,
    either,
    is_bool,
    is_int,
    lift,
    negate,
    to_number,
)

aten = torch.ops.aten


@reads("arange.default", "arange.start", "arange.start_step")
def _arange(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    if node.meta["val"].dtype not in (torch.int32, torch.int64):
        raise Unreadable(node)
    has_start = node.target is not aten.arange.default
    start = size_expr(node.args[0]) if has_start else sympy.Integer(0)
    stride = size_expr(argument(node, 2, "step", 1)) if has_start else sympy.Integer(1)
    return start + stride * indices[0]


@reads("tril.default", "triu.default")
def _triangle(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    row, column = indices[-2:]
    above = column - row - size_expr(argument(node, 1, "diagonal", 0))
    keep = at_least_zero(-above if node.target is aten.tril.default else above)
    dtype = node.meta["val"].dtype
    return either(keep, reader.operand(node.args[0], indices), as_dtype(sympy.Integer(0), dtype))


@reads("cat.default", "concat.default")
def _cat(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    parts = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0) % len(indices)
    return _concatenated(reader, list(parts), indices, dim)


def _concatenated(reader: Reader, parts: list[fx.Node], indices: Indices, dim: int) -> Value:
    first, rest = parts[0], parts[1:]
    if not rest:
        return reader.element(first, _at(indices, dim, indices[dim], first))
    size = sizes_of(first)[dim]
    past = at_least_zero(indices[dim] - size)
    if past == sympy.true:
        return _concatenated(reader, rest, _at(indices, dim, indices[dim] - size), dim)
    inside = reader.element(first, _at(indices, dim, indices[dim], first))
    if past == sympy.false:
        return inside
    return either(negate(past), inside, _concatenated(reader, rest, _at(indices, dim, indices[dim] - size), dim))


def _at(indices: Indices, dim: int, new: Any, part: fx.Node | None = None) -> Indices:
    if part is not None and sizes_of(part)[dim] == 1:
        new = sympy.Integer(0)
    return (*indices[:dim], new, *indices[dim + 1 :])


@reads("diff.default")
def _diff(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    n, dim = argument(node, 1, "n", 1), argument(node, 2, "dim", -1)
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if n != 1 or node.meta["val"].dtype == torch.bool:
        raise Unreadable(node)
    dim %= len(indices)
    parts = [part for part in (prepend, x, append) if part is not None]
    before = _concatenated(reader, parts, indices, dim)
    after = _concatenated(reader, parts, _at(indices, dim, indices[dim] + 1), dim)
    return lift(operator.sub, to_number(after), to_number(before))


@reads("cumsum.default")
def _cumsum(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    dim = argument(node, 1, "dim") % len(indices)
    x: Any = node.args[0]
    summand = to_number(reader.element(x, _at(indices, dim, reader.fresh_index(), x)))
    if not isinstance(summand, sympy.Integer):
        raise Unreadable(node)
    return summand * (indices[dim] + 1)


@reads("index.Tensor")
def _index(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    selectors: list[Any] = list(argument(node, 1, "indices"))
    rank = len(shape_of(x))
    selectors += [None] * (rank - len(selectors))
    tensors = [s for s in selectors if s is not None]
    if any(s.meta["val"].dtype not in (torch.int32, torch.int64) for s in tensors):
        raise Unreadable(node)
    dims = [d for d, s in enumerate(selectors) if s is not None]
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if adjacent else 0  # where the dims of the selectors stand in the result
    count = max(len(shape_of(s)) for s in tensors)
    selected, kept = indices[first : first + count], iter((*indices[:first], *indices[first + count :]))
    sizes = sizes_of(x)
    found = []
    for selector, size in zip(selectors, sizes, strict=True):
        if selector is None:
            found.append(next(kept))
        else:
            found.append(_position(reader.operand(selector, selected), size, node))
    return reader.element(x, tuple(found))


@reads("index_select.default")
def _index_select(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    dim = argument(node, 1, "dim") % len(indices)
    position = _position(reader.operand(node.args[2], (indices[dim],)), sizes_of(x)[dim], node)
    return reader.element(x, _at(indices, dim, position))


@reads("gather.default")
def _gather(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    dim = argument(node, 1, "dim") % len(indices)
    position = _position(reader.operand(node.args[2], indices), sizes_of(x)[dim], node)
    return reader.element(x, _at(indices, dim, position, x))


def _position(value: Value, size: Any, node: fx.Node) -> Any:
    """An index that comes from a tensor; a negative one counts from the end."""
    if is_bool(value) or not is_int(value):
        raise Unreadable(node)
    if size == 1 and value.is_nonnegative:
        return sympy.Integer(0)
    if value.is_nonnegative:
        return value
    return from_end(int(value), size) if isinstance(value, sympy.Integer) else stop(node)
