"""Ops that only move elements (and gradients), each as a map from the indices of a result element to the operand's.

y = x.transpose(0, 1)          y[i, j]    = x[j, i]
y = x.reshape(B, G * R, S)     y[b, n, s] = x[b, n // R, n % R, s]    for x of shape [B, G, R, S]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
import torch.fx as fx

from spcompile.graph.edit import argument, shape_of
from spcompile.recognition.masks.values import Int, Unreadable, floor_div, index_symbol, modulo

aten = torch.ops.aten
Indices: TypeAlias = tuple[Int, ...]


def size_expr(size: Any) -> Int:
    """An int, a SymInt, or a node with one of these as its value, as a sympy expression.

    Raises:
        Unreadable: anything else.
    """
    if isinstance(size, fx.Node):
        size = size.meta.get("val")
    if isinstance(size, torch.SymInt):
        return size.node.expr
    if isinstance(size, int) and not isinstance(size, bool):
        return sympy.Integer(size)
    raise Unreadable


def sizes_of(node: fx.Node) -> tuple[Int, ...]:
    """The shape of a tensor node as sympy expressions."""
    return tuple(size_expr(s) for s in shape_of(node))


@dataclass
class IndexSpace:
    """Index symbols and how far each one runs."""

    sizes: dict[sympy.Symbol, Int] = field(default_factory=dict)

    def add(self, name: str, size: Int) -> Int:
        """A new index symbol in 0 .. size-1; the number 0 where size is 1."""
        if size == 1:
            return sympy.Integer(0)
        symbol = index_symbol(name)
        self.sizes[symbol] = size
        return symbol

    def upper(self, e: Int) -> Int | None:
        """The greatest value of an affine expression with non-negative coefficients; None for any other."""
        total = sympy.Integer(0)
        for term in sympy.Add.make_args(e):
            coefficient, symbol = term.as_coeff_Mul()
            if symbol == 1:
                total += coefficient
            elif symbol in self.sizes and coefficient.is_nonnegative:
                total += coefficient * (self.sizes[symbol] - 1)
            else:
                return None
        return total

    def div(self, e: Int, divisor: int) -> Int:
        """The quotient floor(e / divisor), simplified by what the index symbols can reach."""
        return floor_div(e, divisor, self.upper)

    def mod(self, e: Int, divisor: int) -> Int:
        """The remainder of e / divisor, simplified by what the index symbols can reach."""
        return modulo(e, divisor, self.upper)


Step = Callable[[fx.Node, Indices, IndexSpace], Indices]
_STEPS: dict[Any, Step] = {}


def step(node: fx.Node, indices: Indices, space: IndexSpace) -> tuple[fx.Node, Indices] | None:
    """The operand and the indices at which it holds the element `node[indices]`; None if `node` computes something.

    Raises:
        Unreadable: it moves elements in a way that has no closed form here.
    """
    move = _STEPS.get(node.target) if node.op == "call_function" else None
    if move is None:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    moved = move(node, indices, space)
    assert len(moved) == len(sizes_of(source)), node
    return source, moved


def _moves(*names: str) -> Callable[[Step], Step]:
    def add(function: Step) -> Step:
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet, None), overload or "default", None)
            if op is not None:
                _STEPS[op] = function
        return function

    return add


def _source_sizes(node: fx.Node) -> tuple[Int, ...]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return sizes_of(source)


def _int(value: Any) -> int:
    if isinstance(value, int):
        return value
    raise Unreadable


@_moves("alias", "contiguous", "clone", "lift_fresh_copy", "lift_fresh")
def _unchanged(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    return indices


@_moves("expand", "expand_as", "broadcast_to")
def _expand(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    sizes = _source_sizes(node)
    kept = indices[len(indices) - len(sizes) :]
    return tuple(sympy.Integer(0) if size == 1 else i for size, i in zip(sizes, kept, strict=True))


@_moves("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten.using_ints", "unflatten.int", "unsqueeze")
@_moves("squeeze", "squeeze.dim", "squeeze.dims")
def _reshape(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    new = [(size, i) for size, i in zip(sizes_of(node), indices, strict=True) if size != 1]
    old_sizes = _source_sizes(node)
    old = [size for size in old_sizes if size != 1]
    found: list[Int] = []
    while new and len(found) < len(old):
        first = old[len(found)]
        merged = _product_length([size for size, _ in new], first)  # how many new dims were cut out of one old dim
        split = _product_length(old[len(found) :], new[0][0])  # how many old dims were merged into one new dim
        if merged is not None:
            flat = sympy.Integer(0)
            for size, i in new[:merged]:
                flat = flat * size + i
            found.append(sympy.expand(flat))
            del new[:merged]
        elif split is not None:
            found += _unravel(new[0][1], old[len(found) : len(found) + split], space)
            del new[:1]
        else:
            raise Unreadable
    if new or len(found) != len(old):
        raise Unreadable
    rest = iter(found)
    return tuple(sympy.Integer(0) if size == 1 else next(rest) for size in old_sizes)


def _product_length(sizes: list[Int], whole: Int) -> int | None:
    """How many of the leading sizes multiply to `whole`."""
    product: Int = sympy.Integer(1)
    for count, size in enumerate(sizes, start=1):
        product = sympy.expand(product * size)
        if product == sympy.expand(whole):
            return count
    return None


def _unravel(flat: Int, sizes: list[Int], space: IndexSpace) -> list[Int]:
    found: list[Int] = []
    for size in reversed(sizes[1:]):
        if not size.is_Integer:
            raise Unreadable
        found.append(space.mod(flat, int(size)))
        flat = space.div(flat, int(size))
    return [flat, *reversed(found)]


@_moves("permute")
def _permute(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    dims = argument(node, 1, "dims")
    return _placed(dict(zip((_int(d) % len(indices) for d in dims), indices, strict=True)))


@_moves("transpose.int")
def _transpose(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    a, b = (_int(argument(node, i, f"dim{i - 1}")) for i in (1, 2))
    moved = list(indices)
    moved[a], moved[b] = moved[b], moved[a]
    return tuple(moved)


@_moves("t", "mT", "numpy_T")
def _reversed_matrix(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    if len(indices) < 2:
        return indices
    if node.target is aten.numpy_T.default:
        return indices[::-1]
    return (*indices[:-2], indices[-1], indices[-2])


@_moves("movedim.int")
def _movedim(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    source, target = (_int(argument(node, i, name)) for i, name in ((1, "source"), (2, "destination")))
    moved = list(indices)
    moved.insert(source % len(indices), moved.pop(target % len(indices)))
    return tuple(moved)


def _placed(by_dim: dict[int, Int]) -> Indices:
    return tuple(by_dim[d] for d in range(len(by_dim)))


def from_end(position: Any, size: Int) -> Int:
    """A position that may count from the end of a dim, counted from its start.

    Raises:
        Unreadable: its sign is not known, or it may lie before the start.
    """
    start = size_expr(position)
    if start.is_nonnegative:
        return start
    if start.is_negative and (start + size).is_nonnegative:
        return start + size
    raise Unreadable


@_moves("slice.Tensor")
def _slice(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    dim = _int(argument(node, 1, "dim", 0)) % len(indices)
    start = argument(node, 2, "start")
    stride = _int(argument(node, 4, "step", 1))
    moved = list(indices)
    moved[dim] = from_end(start if start is not None else 0, _source_sizes(node)[dim]) + stride * moved[dim]
    return tuple(moved)


@_moves("narrow")
def _narrow(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    dim = _int(argument(node, 1, "dim")) % len(indices)
    moved = list(indices)
    moved[dim] = from_end(argument(node, 2, "start"), _source_sizes(node)[dim]) + moved[dim]
    return tuple(moved)


@_moves("select.int")
def _select(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    sizes = _source_sizes(node)
    dim = _int(argument(node, 1, "dim")) % len(sizes)
    return (*indices[:dim], from_end(argument(node, 2, "index"), sizes[dim]), *indices[dim:])


@_moves("repeat")
def _repeat(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    sizes = _source_sizes(node)
    repeats = list(argument(node, 1, "repeats"))[len(indices) - len(sizes) :]
    kept = indices[len(indices) - len(sizes) :]
    moved: list[Int] = []
    for size, count, i in zip(sizes, repeats, kept, strict=True):
        if size == 1 or count == 1:
            moved.append(sympy.Integer(0) if size == 1 else i)
        elif size.is_Integer:
            moved.append(space.mod(i, int(size)))
        else:
            raise Unreadable
    return tuple(moved)


@_moves("repeat_interleave.self_int")
def _repeat_interleave(node: fx.Node, indices: Indices, space: IndexSpace) -> Indices:
    repeats, dim = _int(argument(node, 1, "repeats")), argument(node, 2, "dim")
    sizes = _source_sizes(node)
    if dim is None:
        if len(sizes) != 1:
            raise Unreadable
        dim = 0
    moved = list(indices)
    dim = _int(dim) % len(sizes)
    moved[dim] = sympy.Integer(0) if sizes[dim] == 1 else space.div(moved[dim], repeats)
    return tuple(moved)
