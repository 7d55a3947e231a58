"""An attention bias taken apart into terms that can be read, or kept, one by one.

a & b                         both must hold
~(a | b)                      neither may hold
x + y                         two biases
where(a, x, -inf)             a must hold, and the bias x
x.masked_fill(a, -inf)        a must not hold, and the bias x

A large negative number in the place of -inf does the same wherever a row has a key; the terms keep the number.
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

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.graph.edit import argument, is_tensor, shape_of
from spcompile.recognition.masks.finite import is_finite
from spcompile.recognition.masks.index_maps import Indices, sizes_of
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.values import (
    Element,
    Scaled,
    Select,
    Unreadable,
    Value,
    equal_zero,
    negate,
    to_condition,
)

aten = torch.ops.aten


class Role(Enum):
    """What a term of a bias does to the scores."""

    KEEP = "keep"  # bool: True where the key is seen
    DROP = "drop"  # bool: True where it is not
    ADD = "add"  # float: added


@dataclass(frozen=True)
class BiasTerm:
    """One term of a bias, broadcastable to [B, N, S, T] from the right.

    put: of a mask, the call that puts `fill`, a large negative number, in the place of the bias `covered`. None: keys
    that the mask excludes are excluded for good.
    """

    node: fx.Node
    role: Role
    put: fx.Node | None = None

    @property
    def fill(self) -> float:
        """The number that stands where a mask excludes keys."""
        return -math.inf if self.put is None else _filled(self.put)[2]

    @property
    def covered(self) -> list[BiasTerm]:
        """The terms in the place of which the fill is put."""
        return [] if self.put is None else parts_of(_filled(self.put)[0])

    @property
    def dtype(self) -> torch.dtype:
        """What the numbers of the term are rounded to."""
        value: torch.Tensor = (self.put or self.node).meta["val"]
        return value.dtype

    @property
    def is_one_for_all_heads(self) -> bool:
        """Whether heads share it."""
        return [1, 1, 1, *sizes_of(self.node)][-3] == 1

    @property
    def is_one_for_all_rows(self) -> bool:
        """Whether query rows share it."""
        return [1, 1, *sizes_of(self.node)][-2] == 1


def hard(part: BiasTerm) -> BiasTerm:
    """The mask that excludes for good what this one excludes."""
    return BiasTerm(part.node, part.role)


def flipped(part: BiasTerm) -> BiasTerm:
    """The mask that leaves what this one excludes."""
    return BiasTerm(part.node, {Role.KEEP: Role.DROP, Role.DROP: Role.KEEP}[part.role])


@dataclass(frozen=True)
class Reading:
    """What a part means.

    fills: the numbers that stand for keys which are not seen. of_bits: whether integers are taken to be 0 and 1.
    """

    condition: Boolean
    fills: frozenset[float] = frozenset({-math.inf})
    of_bits: bool = False

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


@dataclass(frozen=True)
class Applied:
    """How a term comes to the scores. at: what those are then, or the sum of which the term is a part.

    dtype: what scores are rounded to from there on.
    """

    at: fx.Node
    dtype: torch.dtype


def parts_of(node: fx.Node, role: Role | None = None) -> list[BiasTerm]:
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
        return [BiasTerm(node, role)]
    if node.target is aten.add.Tensor and all(map(is_tensor, node.args)) and argument(node, 2, "alpha", 1) == 1:
        return [part for arg in node.args for part in parts_of(arg)]  # type: ignore[arg-type]
    if node.target in _FILLS:
        covered, mask, fill = _filled(node)
        if fill == -math.inf:
            return [*mask, *parts_of(covered)]
        inner = parts_of(covered) if fill <= EXCLUDES and is_finite(covered) else []
        if inner and all(part.role is Role.ADD for part in inner):
            return [*(BiasTerm(part.node, part.role, node) for part in mask), *inner]
    return [BiasTerm(node, role)]


_FILLS = {aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf}


def _filled(node: fx.Node) -> tuple[fx.Node, list[BiasTerm], float]:
    """(covered, the masks that decide where, the number that is put there) of one of `_FILLS`."""
    args: tuple[Any, ...] = node.args
    if node.target is aten.masked_fill.Scalar:
        return args[0], parts_of(args[1], Role.DROP), float(args[2])
    if node.target is aten.where.ScalarOther:
        return args[1], parts_of(args[0], Role.KEEP), float(args[2])
    return args[2], parts_of(args[0], Role.DROP), float(args[1])


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


def read_part(part: BiasTerm, reader: Reader, indices: Indices) -> Reading:
    """What the part means at one (b, h, q, k).

    Raises:
        Unreadable: it is not a mask, but numbers; or it has no symbolic form.
    """
    value = reader.operand(part.node, indices)
    if part.role is not Role.ADD:
        condition = to_condition(value)
        return Reading(condition if part.role is Role.KEEP else negate(condition), frozenset({part.fill}))
    return _additive(value, part.node)


def _additive(value: Value, node: fx.Node) -> Reading:
    if isinstance(value, Select):
        then, other = (_additive(v, node) for v in (value.then, value.other))
        condition = sympy.Or(
            sympy.And(value.condition, then.condition), sympy.And(negate(value.condition), other.condition)
        )
        return Reading(condition, then.fills | other.fills, then.of_bits or other.of_bits)
    if isinstance(value, Scaled):
        return _of_bits(value, node)
    if value == 0:
        return Reading(sympy.true, frozenset())
    if isinstance(value, float) and value <= EXCLUDES:
        return Reading(sympy.false, frozenset({value}))
    raise Unreadable(node)


def _of_bits(value: Scaled, node: fx.Node) -> Reading:
    """The fill c of c * (1 - m), for a mask m, or for a product of masks: 0 where all are 1, else c, which excludes."""
    bits = sorted(value.number.atoms(Element), key=str)
    constant, product = value.number.as_coeff_Add()
    sign, rest = product.as_coeff_Mul()
    if rest != sympy.Mul(*bits) or (int(constant), int(sign)) not in ((-1, 1), (1, -1), (0, 1), (0, -1)):
        raise Unreadable(node)
    fill = value.factor * (constant if constant != 0 else sign)
    if not -math.inf < fill <= EXCLUDES:
        raise Unreadable(node)
    all_are_1 = sympy.And(*(negate(equal_zero(bit)) for bit in bits))
    return Reading(all_are_1 if constant != 0 else negate(all_are_1), frozenset({float(fill)}), of_bits=True)


def joined_terms(parts: list[BiasTerm], new: Callable[..., fx.Node]) -> fx.Node | None:
    """The parts as one bias again, of the widest dtype among those that are added; None for no parts.

    new: makes a call node from its target and arguments.
    """
    put = next((part.put for part in parts if part.put is not None), None)
    if put is not None:
        masks, covered = [part for part in parts if part.put is put], _filled(put)[0]
        inside = [part for part in parts if part in parts_of(covered)]
        outside = [part for part in parts if part not in masks and part not in inside]
        return joined_terms([BiasTerm(_with_fill(put, masks, inside, new), Role.ADD), *outside], new)
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


def _with_fill(put: fx.Node, masks: list[BiasTerm], inside: list[BiasTerm], new: Callable[..., fx.Node]) -> fx.Node:
    """What `put` makes of these masks and the terms that they cover."""
    covered, all_masks, fill = _filled(put)
    if [hard(part) for part in masks] == all_masks and inside == parts_of(covered):
        return put
    keep, bias = joined_terms([hard(part) for part in masks], new), joined_terms(inside, new)
    if bias is None:
        bias = new(aten.zeros_like.default, keep, dtype=put.meta["val"].dtype)
    return new(aten.where.ScalarOther, keep, bias, fill)


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
