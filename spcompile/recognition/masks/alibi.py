"""ALiBi (arXiv 2108.12409) read from an added bias: a slope for each head times the distance of key and query.

A bias is followed as a sum of head vectors times integer expressions over (b, q, k). What a softmax does not see, a
number that is the same for all keys of a row, is dropped, so slope * k, slope * (k - T) and slope * (k - q) are one and
the same. Beside sinks, which are no keys, it is not dropped: there only slope * (k - q) will do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
import torch.fx as fx

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.graph.edit import argument, is_tensor, shape_of
from spcompile.recognition.masks.index_maps import Indices, sizes_of, step
from spcompile.recognition.masks.match import H, K, Q
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.values import Int, Unreadable, is_int

aten = torch.ops.aten

Linear = dict[fx.Node | None, Int]  # head vector (None for the number 1) -> what it is multiplied with

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default}
_CASTS |= {aten.type_as.default, aten.detach.default, aten.contiguous.default, aten.clone.default}
_WIDE = (torch.float32, torch.float64)


def read_linear(node: fx.Node, reader: Reader, indices: Indices) -> Linear:
    """The bias `node` at one (b, h, q, k).

    Raises:
        Unreadable: it is no such sum, or it was rounded to less than float32, which would be lost; or some integer is
            multiplied by so much that it excludes keys.
    """
    value = _linear(node, reader, indices)
    for e in value.values():
        if any(abs(factor) > -EXCLUDES for factor in sympy.expand(e).as_coefficients_dict().values()):
            raise Unreadable(node)
    return value


def _linear(node: fx.Node, reader: Reader, indices: Indices) -> Linear:
    sizes, rank = sizes_of(node), len(shape_of(node))
    kept = indices[len(indices) - rank :]
    at = tuple(sympy.Integer(0) if size == 1 else i for i, size in zip(kept, sizes, strict=True))
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        value = reader.element(node, at)
        if not is_int(value):
            raise Unreadable(node)
        return {None: value}
    if dtype not in _WIDE:
        raise Unreadable(node)
    if [i for i, size in zip(at, sizes, strict=True) if size != 1] == [H]:
        return {node: sympy.Integer(1)}
    return _computed(node, reader, at)


def _computed(node: fx.Node, reader: Reader, at: Indices) -> Linear:
    moved = step(node, at, reader.space)
    if moved is not None:
        return _linear(moved[0], reader, moved[1])

    def read(arg: Any) -> Linear:
        return _linear(arg, reader, at) if is_tensor(arg) else {None: _rational(arg, node)}

    args: tuple[Any, ...] = node.args
    if node.target in _CASTS:
        return read(args[0])
    if node.target is aten.neg.default:
        return _scaled(read(args[0]), sympy.Integer(-1))
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return _product(read(args[0]), read(args[1]), node)
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return _scaled(read(args[0]), 1 / _rational(args[1], node))
    if node.target in (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar):
        sign = -1 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1
        return _sum(read(args[0]), _scaled(read(args[1]), sign * _rational(argument(node, 2, "alpha", 1), node)))
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        return _sum(read(args[1]), _scaled(read(args[0]), -_rational(argument(node, 2, "alpha", 1), node)))
    if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step) and node.op == "call_function":
        start = _rational(args[0], node) if node.target is not aten.arange.default else sympy.Integer(0)
        width = _rational(args[2], node) if len(args) > 2 else sympy.Integer(1)
        return {None: start + width * at[0]}
    raise Unreadable(node)


def _rational(arg: Any, node: fx.Node) -> Int:
    if isinstance(arg, bool) or not isinstance(arg, int | float) or arg != arg or arg in (float("inf"), float("-inf")):
        raise Unreadable(node)
    return sympy.Rational(arg)  # a float is a binary fraction: nothing is rounded here


def _scaled(value: Linear, factor: Int) -> Linear:
    return {head: e * factor for head, e in value.items()}


def _sum(a: Linear, b: Linear) -> Linear:
    return {head: a.get(head, sympy.Integer(0)) + b.get(head, sympy.Integer(0)) for head in {**a, **b}}


def _product(a: Linear, b: Linear, node: fx.Node) -> Linear:
    if None in b and len(b) == 1:
        a, b = b, a
    if set(a) != {None}:
        raise Unreadable(node)
    return _scaled(b, a[None])


def slopes_of(value: Linear, is_causal: bool, has_sinks: bool) -> dict[fx.Node | None, float] | None:
    """The slope by which each head vector is multiplied; None where the bias is not linear in the key's position.

    Nothing where it is the same for all keys of a row.

    is_causal: no key that is seen lies behind its query, so |q - k| is q - k.
    """
    found = {}
    for head, e in value.items():
        if head is not None and comes_from_trained_input(head):
            return None
        if is_causal:
            e = e.subs(sympy.Abs(Q - K), Q - K)
        e = sympy.expand(e)
        slope = e.coeff(K)
        rest = sympy.expand(e - slope * K)
        if not slope.is_Rational or rest.has(K) or rest.has(H):
            return None
        if has_sinks and sympy.expand(rest + slope * Q) != 0:
            return None
        if slope != 0:
            found[head] = float(slope)
    return found


def comes_from_trained_input(node: fx.Node) -> bool:
    """Whether a value is made of an input that requires a gradient."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each in seen or each.target is aten.detach.default:
            continue
        seen.add(each)
        given = getattr(each.meta.get("grapharg"), "example", each.meta.get("val"))
        if each.op in ("placeholder", "get_attr") and getattr(given, "requires_grad", False):
            return True
        pending += each.all_input_nodes
    return False


def sum_of(values: Iterable[Linear]) -> Linear:
    """The sum of some biases."""
    return functools.reduce(_sum, values, {})


def write_slopes(slopes: dict[fx.Node | None, float], q: fx.Node, new: Callable[..., fx.Node]) -> fx.Node | None:
    """The slopes [N] of all heads, None for no slopes; q [B, N, S, H]."""
    heads = shape_of(q)[1]
    total: fx.Node | None = None
    for head, factor in slopes.items():
        if head is None:
            dtype = torch.float64 if q.meta["val"].dtype == torch.float64 else torch.float32
            term = new(aten.full.default, [heads], factor, dtype=dtype, device=q.meta["val"].device)
        else:
            term = head if len(shape_of(head)) == 1 else new(aten.reshape.default, head, [-1])
            term = term if factor == 1 else new(aten.mul.Tensor, term, factor)
        total = term if total is None else new(aten.add.Tensor, total, term)
    return total
