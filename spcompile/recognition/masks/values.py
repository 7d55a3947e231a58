"""What one element of a mask can be, as a function of index symbols.

    Int     a sympy integer expression over index symbols, size symbols and Element(...) look-ups
    Bool    a sympy condition in negation normal form over three literals: e >= 0, e == 0, e != 0
    float   a constant
    Scaled  a constant times an integer expression of data, which is small: 0 and 1, as masks are
    Select  a choice between two of these

All index symbols are non-negative integers. Comparisons are normalised on construction, so that equal conditions
that were written differently (k <= q, q >= k, k - q < 1, not k > q) are the same object.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch.fx as fx
from sympy.logic.boolalg import Boolean, BooleanAtom

Int: TypeAlias = sympy.Expr
Value: TypeAlias = Any  # Int, Boolean, float, Scaled or Select; sympy has no types to say more


@dataclass(frozen=True)
class Select:
    """`then` where `condition` holds, `other` elsewhere."""

    condition: Boolean
    then: Any
    other: Any


@dataclass(frozen=True)
class Scaled:
    """A floating-point number: factor * number, of integers that are elements of tensors.

    Large ones are rounded, but never past a small one: comparisons with small multiples of `factor` are exact.
    """

    factor: float
    number: Int

    def __neg__(self) -> Value:
        return self * -1.0

    def __abs__(self) -> Value:
        raise Unreadable

    def __mul__(self, other: Value) -> Value:
        factor, number = _factor_and_number(other)
        if not math.isfinite(factor):
            raise Unreadable
        return Scaled(self.factor * factor, sympy.expand(self.number * number)) if factor != 0 else 0.0

    def __truediv__(self, other: Value) -> Value:
        return self * (1 / other)

    def __add__(self, other: Value) -> Value:
        factor, number = _factor_and_number(other)
        times = factor / self.factor
        if not times.is_integer():
            raise Unreadable
        return Scaled(self.factor, sympy.expand(self.number + int(times) * number))

    def __sub__(self, other: Value) -> Value:
        return self + -other

    def __rsub__(self, other: Value) -> Value:
        return -self + other

    __rmul__, __radd__ = __mul__, __add__

    def compare(self, name: str, other: float) -> Boolean:
        """The condition `self <name> other`."""
        bound = other / self.factor
        if self.factor < 0:
            name = _MIRRORED.get(name, name)
        if abs(bound) > _SMALL:
            raise Unreadable
        if name in ("eq", "ne"):
            same = equal_zero(self.number - int(bound)) if bound.is_integer() else sympy.false
            return same if name == "eq" else negate(same)
        above = at_least_zero(self.number - (math.floor(bound) + 1 if name in ("gt", "le") else math.ceil(bound)))
        return above if name in ("gt", "ge") else negate(above)


def _factor_and_number(value: Value) -> tuple[float, Int]:
    return (value.factor, value.number) if isinstance(value, Scaled) else (value, sympy.Integer(1))


_SMALL = 128  # integers up to it are exact in every dtype, and so are differences of theirs


class Element(sympy.Function):
    """Element(Str(name), *indices): one element of the integer or bool (0 or 1) tensor that the node `name` makes."""

    is_integer = True
    is_real = True
    is_finite = True

    @property
    def node_name(self) -> str:
        """The node that makes the tensor."""
        return str(self.args[0].name)

    @property
    def indices(self) -> tuple[Int, ...]:
        """Which element."""
        return tuple(self.args[1:])


class Unreadable(Exception):
    """This value has no symbolic form. `node`: the call that has none, where known."""

    def __init__(self, node: fx.Node | None = None) -> None:
        self.node = node


def index_symbol(name: str) -> sympy.Symbol:
    """An index symbol."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def is_bool(value: Value) -> bool:
    """A condition, not a number (a sympy symbol is an instance of both)."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Expr)


def is_int(value: Value) -> bool:
    """An integer expression."""
    return isinstance(value, sympy.Expr)


def at_least_zero(e: Int) -> Boolean:
    """The condition e >= 0."""
    e = sympy.expand(e)
    if e.is_nonnegative:
        return sympy.true
    if e.is_negative:
        return sympy.false
    for absolute in e.atoms(sympy.Abs):
        rest, inner = sympy.expand(e + absolute), absolute.args[0]
        if not rest.has(absolute):  # |x| <= rest
            return sympy.And(at_least_zero(rest - inner), at_least_zero(rest + inner))
        rest = sympy.expand(e - absolute)
        if not rest.has(absolute):  # |x| >= -rest
            return sympy.Or(at_least_zero(rest + inner), at_least_zero(rest - inner))
    return sympy.Ge(e, 0)


def equal_zero(e: Int) -> Boolean:
    """The condition e == 0."""
    e = sympy.expand(e)
    if e.is_zero:
        return sympy.true
    if e.is_nonzero:
        return sympy.false
    if e.could_extract_minus_sign():
        e = -e
    return sympy.Eq(e, 0)


def negate(condition: Boolean) -> Boolean:
    """Not, in normal form."""
    if isinstance(condition, BooleanAtom):
        return sympy.true if condition == sympy.false else sympy.false
    if isinstance(condition, sympy.And):
        return sympy.Or(*map(negate, condition.args))
    if isinstance(condition, sympy.Or):
        return sympy.And(*map(negate, condition.args))
    if isinstance(condition, sympy.Ge):
        return at_least_zero(-condition.lhs - 1)
    if isinstance(condition, sympy.Eq):
        return sympy.Ne(condition.lhs, 0)
    if isinstance(condition, sympy.Ne):
        return equal_zero(condition.lhs)
    raise AssertionError(f"not in normal form: {condition}")


def substitute(condition: Boolean, values: dict[sympy.Symbol, Int]) -> Boolean:
    """The condition with other indices, in normal form again."""
    if isinstance(condition, BooleanAtom):
        return condition
    if isinstance(condition, sympy.And | sympy.Or):
        return condition.func(*(substitute(arg, values) for arg in condition.args))
    e = condition.lhs.subs(values, simultaneous=True)
    if isinstance(condition, sympy.Ge):
        return at_least_zero(e)
    return equal_zero(e) if isinstance(condition, sympy.Eq) else negate(equal_zero(e))


def either(condition: Boolean, then: Value, other: Value) -> Value:
    """`then` where `condition` holds, `other` elsewhere, simplified."""
    if condition == sympy.true:
        return then
    if condition == sympy.false:
        return other
    then, other = _under(condition, then), _under(negate(condition), other)
    if is_bool(then) and is_bool(other):
        return then if then == other else sympy.Or(sympy.And(condition, then), sympy.And(negate(condition), other))
    if _same(then, other):
        return then
    if is_int(then) and is_int(other):
        zero = _symbol_that_is_zero(condition)
        if zero is not None and sympy.expand(other.subs(zero, 0) - then.subs(zero, 0)) == 0:
            return other
    return Select(condition, then, other)


def lift(function: Callable[..., Value], *operands: Value) -> Value:
    """`function` applied inside the choices of its operands."""
    for operand in operands:
        if isinstance(operand, Select):
            choice = operand
            then = [_under(choice.condition, o) for o in operands]
            other = [_under(negate(choice.condition), o) for o in operands]
            return either(choice.condition, lift(function, *then), lift(function, *other))
    return function(*operands)


def size(value: Value) -> int:
    """How many numbers, literals and terms of sums the value is made of."""
    if isinstance(value, Select):
        return size(value.condition) + size(value.then) + size(value.other)
    if isinstance(value, sympy.And | sympy.Or):
        return sum(map(size, value.args))
    if isinstance(value, sympy.Ge | sympy.Eq | sympy.Ne):
        return size(value.lhs)
    return sum(1 + len(term.atoms(sympy.floor)) for term in sympy.Add.make_args(value)) if is_int(value) else 1


def to_condition(value: Value) -> Boolean:
    """The value converted to bool: different from zero."""
    if isinstance(value, Select):
        return either(value.condition, to_condition(value.then), to_condition(value.other))
    if isinstance(value, float):
        return sympy.true if value != 0 else sympy.false
    if isinstance(value, Scaled):
        value = value.number
    if is_bool(value):
        return value
    factors = value.args if isinstance(value, sympy.Mul) else (value,)
    return sympy.And(*(negate(equal_zero(factor)) for factor in factors))


def to_number(value: Value) -> Value:
    """A condition as 0 or 1; anything else as it is."""
    return either(value, sympy.Integer(1), sympy.Integer(0)) if is_bool(value) else value


def to_float(value: Value) -> Value:
    """The value converted to floating point.

    Raises:
        Unreadable: it is an integer that depends on positions; rounding cannot be followed.
    """
    return lift(_float, to_number(value))


def relation(name: str, left: Value, right: Value) -> Boolean:
    """One of le, lt, ge, gt, eq, ne.

    Raises:
        Unreadable: a float meets an integer that is not a constant.
    """
    return lift(lambda a, b: _compare(name, a, b), to_number(left), to_number(right))


def floor_div(numerator: Int, divisor: int, upper: Callable[[Int], Int | None]) -> Int:
    """floor(numerator / divisor) for a positive divisor; upper(e) is the greatest value of e where known."""
    whole, rest = _split_multiples(numerator, divisor)
    if rest.is_nonnegative:
        bound = upper(rest)
        if bound is not None and (divisor - 1 - bound).is_nonnegative:
            return whole
    return whole + sympy.floor(rest / divisor)


def modulo(numerator: Int, divisor: int, upper: Callable[[Int], Int | None]) -> Int:
    """The remainder numerator - divisor * floor(numerator / divisor)."""
    _, rest = _split_multiples(numerator, divisor)
    return sympy.expand(rest - divisor * floor_div(rest, divisor, upper))


def _split_multiples(e: Int, divisor: int) -> tuple[Int, Int]:
    whole, rest = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(e)):
        coefficient, symbols = term.as_coeff_Mul()
        if coefficient.is_Integer:
            quotient = coefficient // divisor
            whole += quotient * symbols
            rest += (coefficient - quotient * divisor) * symbols
        else:
            rest += term
    return whole, rest


def _float(value: Value) -> Value:
    if isinstance(value, Scaled):
        return value
    is_data = is_int(value) and value.has(Element) and not value.replace(Element, lambda *_: sympy.S.One).free_symbols
    return Scaled(1.0, value) if is_data else _float_constant(value)


def _float_constant(value: Value) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, sympy.Integer):
        return float(value)
    raise Unreadable


_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


def _compare(name: str, left: Value, right: Value) -> Boolean:
    for a, b, mirrored in ((left, right, name), (right, left, _MIRRORED.get(name, name))):
        if isinstance(a, Scaled):
            return a.compare(mirrored, _float_constant(b))
    left, right = (sympy.Integer(int(x)) if isinstance(x, float) and x.is_integer() else x for x in (left, right))
    if isinstance(left, float) or isinstance(right, float):
        a, b = _float_constant(left), _float_constant(right)
        holds = {"le": a <= b, "lt": a < b, "ge": a >= b, "gt": a > b, "eq": a == b, "ne": a != b}[name]
        return sympy.true if holds else sympy.false
    if name in ("eq", "ne"):
        return equal_zero(left - right) if name == "eq" else negate(equal_zero(left - right))
    difference = left - right if name in ("ge", "gt") else right - left
    return at_least_zero(difference if name in ("ge", "le") else difference - 1)


def _under(condition: Boolean, value: Value) -> Value:
    """The value, simplified where `condition` is known to hold."""
    if not isinstance(value, Select):
        return value
    if value.condition == condition:
        return _under(condition, value.then)
    if value.condition == negate(condition):
        return _under(condition, value.other)
    return either(value.condition, _under(condition, value.then), _under(condition, value.other))


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def _symbol_that_is_zero(condition: Boolean) -> sympy.Symbol | None:
    """The index symbol that this condition forces to zero."""
    e = condition.lhs if isinstance(condition, sympy.Ge | sympy.Eq) else None
    if e is None or len(e.free_symbols) != 1:
        return None
    (symbol,) = e.free_symbols
    return symbol if e in (-symbol, symbol) and (isinstance(condition, sympy.Eq) or e == -symbol) else None
