"""An attention bias taken apart into terms that can be read, or kept, one by one.

a & b                         both must hold
~(a | b)                      neither may hold
x + y                         two biases
where(a, x, -inf)             a must hold, and the bias x
x.masked_fill(a, -inf)        a must not hold, and the bias x
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from typing import Any

import sympy
import torch
import torch.fx as fx
from sympy.logic.boolalg import Boolean

from spcompile.graph import argument, is_tensor, shape_of
from spcompile.symbolic_mask.reader import Reader
from spcompile.symbolic_mask.values import Select, Unreadable, Value, negate, to_condition
from spcompile.symbolic_mask.views import Indices, sizes_of

aten = torch.ops.aten
REPLACED_BELOW = -9e3  # a number in the place of a score excludes its key: -1e4 has long been in use as one


class Role(Enum):
    """What a term of a bias does to the scores."""

    KEEP = "keep"  # bool: True where the key is seen
    DROP = "drop"  # bool: True where it is not
    ADD = "add"  # float: added


@dataclass(frozen=True)
class Part:
    """One term of a bias, broadcastable to [B, N, S, T] from the right."""

    node: fx.Node
    role: Role


@dataclass(frozen=True)
class Reading:
    """What a part means. fills: the numbers that stand for keys which are not seen."""

    condition: Boolean
    fills: frozenset[float] = frozenset({-math.inf})

    @property
    def finite(self) -> bool:
        """Whether a row without keys may be something else than zeros."""
        return bool(self.fills - {-math.inf})


_AND = {aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default}
_OR = {aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default}
_NOT = {aten.bitwise_not.default, aten.logical_not.default}
_SAME = {aten.expand.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.contiguous.default}
_SAME |= {aten.alias.default, aten.clone.default, aten._to_copy.default}
_VIEWS = {aten.unsqueeze.default, aten.view.default, aten.reshape.default}


def parts_of(node: fx.Node, role: Role | None = None) -> list[Part]:
    """The terms of the bias `node`."""
    is_bool = node.meta["val"].dtype == torch.bool
    role = role or (Role.KEEP if is_bool else Role.ADD)
    if (node.target in _SAME and _dtype_class(node.args[0]) == _dtype_class(node)) or _adds_leading_dims(node):
        return parts_of(node.args[0], role)  # type: ignore[arg-type]
    if is_bool:
        if node.target in _NOT and _dtype_class(node.args[0]) == "bool":
            return parts_of(node.args[0], Role.DROP if role is Role.KEEP else Role.KEEP)  # type: ignore[arg-type]
        joined = _AND if role is Role.KEEP else _OR
        if node.target in joined and all(_dtype_class(arg) == "bool" for arg in node.args[:2]):
            return [part for arg in node.args[:2] for part in parts_of(arg, role)]  # type: ignore[arg-type]
        return [Part(node, role)]
    if node.target is aten.add.Tensor and all(map(is_tensor, node.args)) and argument(node, 2, "alpha", 1) == 1:
        return [part for arg in node.args for part in parts_of(arg)]  # type: ignore[arg-type]
    if node.target is aten.masked_fill.Scalar and node.args[2] == -math.inf:
        return [*parts_of(node.args[1], Role.DROP), *parts_of(node.args[0])]  # type: ignore[arg-type]
    if node.target is aten.where.ScalarOther and node.args[2] == -math.inf:
        return [*parts_of(node.args[0], Role.KEEP), *parts_of(node.args[1])]  # type: ignore[arg-type]
    return [Part(node, role)]


def _adds_leading_dims(node: fx.Node) -> bool:
    """Whether the result has the same shape once dims of size 1 are added at the front, and so broadcasts the same."""
    if node.target not in _VIEWS:
        return False
    before, after = sizes_of(node.args[0]), sizes_of(node)  # type: ignore[arg-type]
    added = len(after) - len(before)
    return added >= 0 and after == (*(sympy.Integer(1),) * added, *before)


def _dtype_class(node: Any) -> str | None:
    if not is_tensor(node):
        return None
    dtype = node.meta["val"].dtype
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def read_part(part: Part, reader: Reader, indices: Indices) -> Reading:
    """What the part means at one (b, h, q, k).

    Raises:
        Unreadable: it is not a mask, but numbers; or it has no symbolic form.
    """
    value = reader.operand(part.node, indices)
    if part.role is not Role.ADD:
        condition = to_condition(value)
        return Reading(condition if part.role is Role.KEEP else negate(condition))
    return _additive(value, masked_below(part.node.meta["val"].dtype), part.node)


def masked_below(dtype: torch.dtype) -> float:
    """An added number that excludes a key from a softmax over scores of any sane size."""
    return max(-1e8, torch.finfo(dtype).min / 2)


def _additive(value: Value, limit: float, node: fx.Node) -> Reading:
    if isinstance(value, Select):
        then, other = (_additive(v, limit, node) for v in (value.then, value.other))
        condition = sympy.Or(
            sympy.And(value.condition, then.condition), sympy.And(negate(value.condition), other.condition)
        )
        return Reading(condition, then.fills | other.fills)
    if value == 0:
        return Reading(sympy.true, frozenset())
    if isinstance(value, float) and value <= limit:
        return Reading(sympy.false, frozenset({value}))
    raise Unreadable(node)


_FINITE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.embedding.default}
_FINITE |= {aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default}
_FINITE |= {aten.unflatten.int, aten.flatten.using_ints, aten.repeat.default, aten.select.int, aten.slice.Tensor}
_FINITE |= {aten.index.Tensor, aten.abs.default, aten.tanh.default, aten.sigmoid.default}


def is_finite(node: fx.Node) -> bool:
    """Whether a bias provably excludes no key: it is made of integers and parameters by ops that keep numbers finite.

    Parameters (inputs that require a gradient) are taken to be finite; a buffer may hold a mask.
    """
    value = node.meta["val"]
    if not value.dtype.is_floating_point:
        return True
    if node.op == "placeholder":
        given = getattr(node.meta.get("grapharg"), "example", value)
        return bool(getattr(given, "requires_grad", False))
    constants = [arg for arg in node.args if isinstance(arg, float)]
    if node.target not in _FINITE | _SAME or any(abs(c) > -masked_below(value.dtype) for c in constants):
        return False
    return all(is_finite(operand) for operand in node.all_input_nodes if is_tensor(operand))


def join(parts: list[Part], new: Callable[..., fx.Node]) -> fx.Node | None:
    """The parts as one bias again, of the widest dtype among those that are added; None for no parts.

    new: makes a call node from its target and arguments.
    """
    conditions = [
        part.node if part.role is Role.KEEP else new(aten.logical_not.default, part.node)
        for part in parts
        if part.role is not Role.ADD
    ]
    numbers = [part.node for part in parts if part.role is Role.ADD]
    dtype = reduce(torch.promote_types, (n.meta["val"].dtype for n in numbers), torch.bool)
    numbers = [n if n.meta["val"].dtype == dtype else new(aten.to.dtype, n, dtype) for n in numbers]
    keep = reduce(lambda a, b: new(aten.logical_and.default, a, b), conditions) if conditions else None
    total = reduce(lambda a, b: new(aten.add.Tensor, a, b), numbers) if numbers else None
    if keep is None or total is None:
        return keep if total is None else total
    return new(aten.where.ScalarOther, keep, total, -math.inf)


def full_bias(bias: fx.Node | None, q: fx.Node, k: fx.Node, new: Callable[..., fx.Node]) -> fx.Node | None:
    """The bias as a view [B or 1, N or 1, S or 1, T], as spx.attention takes it; q [B, N, S, H], k [B, G, T, H]."""
    if bias is None:
        return None
    while len(shape_of(bias)) < 4:
        bias = new(aten.unsqueeze.default, bias, 0)
    bias = _one_row(bias)
    if sizes_of(bias)[3] != 1 or sizes_of(k)[2] == 1:
        return bias
    length = shape_of(k)[2]
    return new(
        aten.expand.default, bias, [-1, -1, -1, length if isinstance(length, int) else new(aten.sym_size.int, k, 2)]
    )


def _one_row(bias: fx.Node) -> fx.Node:
    """The operand with one row where `bias` repeats that for all query rows."""
    source: Any = bias.args[0] if bias.target is aten.expand.default else None
    if source is None or len(sizes_of(source)) != 4:
        return bias
    before, after = sizes_of(source), sizes_of(bias)
    repeats_rows = before[2] == 1 and (*before[:2], before[3]) == (*after[:2], after[3])
    return source if repeats_rows else bias
