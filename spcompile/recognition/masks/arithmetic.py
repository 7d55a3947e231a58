"""Reads ops that compute each element from the same element of their operands: constants, arithmetic, comparisons."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx

from spcompile.graph.edit import argument
from spcompile.recognition.masks.index_maps import Indices
from spcompile.recognition.masks.reader import Reader, as_dtype, reads
from spcompile.recognition.masks.values import (
    Select,
    Unreadable,
    Value,
    either,
    is_int,
    lift,
    negate,
    relation,
    to_condition,
    to_float,
    to_number,
)

aten = torch.ops.aten


def operands(reader: Reader, node: fx.Node, indices: Indices, names: Sequence[str]) -> list[Value]:
    """The operands with these names of an elementwise call whose result is read at `indices`."""
    return [reader.operand(argument(node, i, name), indices) for i, name in enumerate(names)]


@reads("ones", "new_ones", "ones_like")
def _ones(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return sympy.Integer(1)


@reads("zeros", "new_zeros", "zeros_like")
def _zeros(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return sympy.Integer(0)


@reads("full.default", "full_like.default", "new_full.default")
def _full(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    place = 2 if node.target is aten.new_full.default else 1
    return reader.operand(argument(node, place, "fill_value"), ())


@reads("scalar_tensor.default")
def _scalar_tensor(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return reader.operand(node.args[0], ())


@reads("to", "_to_copy", "type_as", "detach")
def _cast(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return reader.operand(node.args[0], indices)


def _arithmetic(name: str, on_numbers: Callable[[Any, Any], Any]) -> None:
    def read(reader: Reader, node: fx.Node, indices: Indices) -> Value:
        a, b = operands(reader, node, indices, ("self", "other"))
        alpha = reader.operand(argument(node, 2, "alpha", 1), ())
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            if name not in ("add", "mul"):
                raise Unreadable(node)
            return (sympy.Or if name == "add" else sympy.And)(to_condition(a), to_condition(b))
        convert = to_float if dtype.is_floating_point else to_number
        a, b = convert(a), convert(b)
        scale = to_float(alpha) if dtype.is_floating_point else alpha

        def compute(x: Any, y: Any) -> Any:
            if not dtype.is_floating_point and (isinstance(x, float) or isinstance(y, float)):
                raise Unreadable(node)
            return on_numbers(y, x * scale) if name == "rsub" else on_numbers(x, y * scale)

        return lift(compute, a, b)

    reads(f"{name}.Tensor", f"{name}.Scalar")(read)


_arithmetic("add", operator.add)
_arithmetic("sub", operator.sub)
_arithmetic("rsub", operator.sub)
_arithmetic("mul", operator.mul)


@reads("div.Tensor", "div.Scalar", "true_divide")
def _divide(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = (to_float(x) for x in operands(reader, node, indices, ("self", "other")))
    if not isinstance(b, float) or b == 0:
        raise Unreadable(node)
    return lift(operator.truediv, a, b)


@reads("floor_divide", "div.Tensor_mode", "div.Scalar_mode")
def _floor_divide(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = operands(reader, node, indices, ("self", "other"))
    mode = node.kwargs.get("rounding_mode", "floor")
    if not is_int(a) or not isinstance(b, sympy.Integer) or b <= 0:
        raise Unreadable(node)
    if mode != "floor" and not (mode == "trunc" and a.is_nonnegative):
        raise Unreadable(node)
    return reader.space.div(a, int(b))


@reads("remainder.Tensor", "remainder.Scalar")
def _remainder(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = operands(reader, node, indices, ("self", "other"))
    if not is_int(a) or not isinstance(b, sympy.Integer) or b <= 0:
        raise Unreadable(node)
    return reader.space.mod(a, int(b))


@reads("neg.default")
def _neg(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return lift(operator.neg, to_number(reader.operand(node.args[0], indices)))


@reads("abs.default")
def _abs(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return lift(abs, to_number(reader.operand(node.args[0], indices)))


@reads("minimum.default", "maximum.default")
def _extremum(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = operands(reader, node, indices, ("self", "other"))
    first = "le" if node.target is aten.minimum.default else "ge"
    return either(relation(first, a, b), to_number(a), to_number(b))


@reads("clamp.default", "clamp_min.default", "clamp_max.default")
def _clamp(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    value = to_number(reader.operand(node.args[0], indices))
    low = argument(node, 1, "min") if node.target is not aten.clamp_max.default else None
    place = 2 if node.target is aten.clamp.default else 1
    high = argument(node, place, "max") if node.target is not aten.clamp_min.default else None
    if low is not None:
        bound = reader.operand(low, ())
        value = either(relation("lt", value, bound), bound, value)
    if high is not None:
        bound = reader.operand(high, ())
        value = either(relation("gt", value, bound), bound, value)
    return value


def _comparison(*names: str) -> None:
    def read(reader: Reader, node: fx.Node, indices: Indices) -> Value:
        a, b = operands(reader, node, indices, ("self", "other"))
        if names[0] in ("eq", "ne") and (isinstance(a, Select) or isinstance(b, Select)):
            a, b = reader.two_elements(node, indices) or (a, b)
        return relation(names[0], a, b)

    reads(*(f"{name}.{overload}" for name in names for overload in ("Tensor", "Scalar")))(read)


_comparison("le", "less_equal")
_comparison("lt", "less")
_comparison("ge", "greater_equal")
_comparison("gt", "greater")
_comparison("eq")
_comparison("ne", "not_equal")


def _logical(function: Callable[..., Value], *names: str) -> None:
    def read(reader: Reader, node: fx.Node, indices: Indices) -> Value:
        is_bitwise = not str(node.target).startswith("aten.logical")
        if is_bitwise and node.meta["val"].dtype != torch.bool:
            raise Unreadable(node)
        return function(*map(to_condition, operands(reader, node, indices, ("self", "other")[: len(node.args)])))

    reads(*names)(read)


_logical(sympy.And, "logical_and", "bitwise_and.Tensor", "bitwise_and.Scalar", "__and__.Tensor", "__and__.Scalar")
_logical(sympy.Or, "logical_or", "bitwise_or.Tensor", "bitwise_or.Scalar", "__or__.Tensor", "__or__.Scalar")
_logical(negate, "logical_not", "bitwise_not")


@reads("logical_xor", "bitwise_xor.Tensor", "bitwise_xor.Scalar", "__xor__.Tensor", "__xor__.Scalar")
def _xor(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    if node.meta["val"].dtype != torch.bool:
        raise Unreadable(node)
    a, b = map(to_condition, operands(reader, node, indices, ("self", "other")))
    return sympy.Or(sympy.And(a, negate(b)), sympy.And(negate(a), b))


@reads("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where_op(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    condition, then, other = operands(reader, node, indices, ("condition", "self", "other"))
    dtype = node.meta["val"].dtype
    return either(to_condition(condition), as_dtype(then, dtype), as_dtype(other, dtype))


@reads("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    value, mask, fill = operands(reader, node, indices, ("self", "mask", "value"))
    dtype = node.meta["val"].dtype
    return either(to_condition(mask), as_dtype(fill, dtype), as_dtype(value, dtype))
