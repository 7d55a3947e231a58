"""Sizes that may be symbols. Comparisons here never add a guard: what is not known statically is not equal."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = Any  # int or SymInt


def expression(size: Size) -> sympy.Expr:
    """The sympy expression of a size, with everything the shape environment knows put in."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all sizes of two tensors are equal for all values of their symbols."""
    return a.ndim == b.ndim and all(map(same, a.shape, b.shape))


def quotient(a: Size, b: Size) -> Size | None:
    """A / b where b divides a for all values of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(expression(a) / expression(b))
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else a // b


def divides(divisor: int, size: Size) -> bool:
    """Whether `divisor` divides `size` for all values of its symbols."""
    if isinstance(size, int):
        return size % divisor == 0
    return bool(statically_known_true(size % divisor == 0))


def hint(size: Size) -> int:
    """A number to estimate with: the value at trace time for a symbol."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return int(known) if known is not None else 1


def numel_hint(value: torch.Tensor) -> int:
    """Estimated number of elements of an example tensor."""
    count = 1
    for size in value.shape:
        count *= hint(size)
    return count
