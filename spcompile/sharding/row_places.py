"""Where a reshape leaves the rows of the batch: in a dim of their own, or in one that holds more than them.

A reshape keeps the order of all numbers, so rows keep their *place*: the product of all that stands before them. Shapes
are those with one row, in which rows can be between any two dims.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from spcompile.graph.sizes import Size, same


class NoPlace(Exception):
    """The sizes do not tell where the rows are."""


class Rows(NamedTuple):
    """Rows are in `dim`, behind `before` numbers of it: 1 where they come first in it, or have it to themselves."""

    dim: int
    before: Size = 1
    guessed: bool = False  # whether sizes alone did not tell

    def place(self, shape: Sequence[Size]) -> Size:
        """The product of all that stands before the rows of a value of this shape."""
        return math.prod(shape[: self.dim]) * self.before


def reshaped(rows: Rows, old: Sequence[Size], new: Sequence[Size], written: Sequence[Any]) -> Rows:
    """Where the rows of a value of shape `old` are in its reshape to `new`. written: as the user wrote `new`, with -1.

    Rows that end up between two dims belong to the one whose size was left to be inferred. Without such a one, the dim
    behind them stays as it is where it is what was behind them, [S, B, D] -> [S * B, D]. A part of that is taken to be
    shared out with them, [S, B, N * H] -> [S, B * N, H]: a guess.

    Raises:
        NoPlace: no dim, or one of several.
    """
    place = rows.place(old)
    own = [i for i in _units(new) if same(math.prod(new[:i]), place)]
    if own:
        return Rows(_own_dim(rows, old, own, [i for i in _units(old) if same(math.prod(old[:i]), place)], new, written))
    behind = next((i for i in range(len(new) + 1) if same(math.prod(new[:i]), place)), None)
    if behind is None:
        return _inside(rows, place, old, new)
    last, first = Rows(behind - 1, new[behind - 1] if behind else 1, rows.guessed), Rows(behind, 1, rows.guessed)
    if behind in (0, len(new)):
        return last if behind else first
    inferred = [side for side in (last, first) if _is_inferred(written[side.dim])]
    if len(inferred) == 1:
        return inferred[0]
    rest = [_after(rows, old), *old[rows.dim + 1 :]]
    if any(same(math.prod(rest[:i]), new[behind]) for i in range(1, len(rest) + 1)):
        return last
    return first._replace(guessed=True)


def _own_dim(
    rows: Rows, old: Sequence[Size], own: list[int], own_before: list[int], new: Sequence[Size], written: Sequence[Any]
) -> int:
    """Which dim of size 1 at the place of the rows is theirs: the only one, the inferred one, or by order."""
    inferred = [i for i in own if _is_inferred(written[i])]
    if len(own) == 1:
        return own[0]
    if len(inferred) == 1:
        return inferred[0]
    if rows.dim in own_before and len(own_before) == len(own):
        return own[own_before.index(rows.dim)]
    raise NoPlace(f"the batch of {list(old)} may be any of the dims {own} of {list(new)}")


def _inside(rows: Rows, place: Size, old: Sequence[Size], new: Sequence[Size]) -> Rows:
    """Rows in the middle of a dim."""
    for dim in range(len(new)):
        with contextlib.suppress(NoPlace):
            return Rows(dim, before_in(place, new, dim), rows.guessed)
    raise NoPlace(f"the batch of {list(old)} cannot be found in {list(new)}")


def before_in(place: Size, shape: Sequence[Size], dim: int) -> Size:
    """What stands before the rows in dim `dim`, given all that stands before them.

    Raises:
        NoPlace: they are not in that dim.
    """
    start = math.prod(shape[:dim])
    for before in (1, shape[dim]):
        if same(start * before, place):
            return before
    if _divides(start, place) and _divides(place, start * shape[dim]):
        return place // start
    raise NoPlace(f"the batch is not in dim {dim} of {list(shape)}")


def _after(rows: Rows, old: Sequence[Size]) -> Size:
    """What stands behind the rows in their dim."""
    size = old[rows.dim]
    if same(rows.before, size):
        return 1
    return size // rows.before if _divides(rows.before, size) else size


def _units(shape: Sequence[Size]) -> list[int]:
    return [i for i, size in enumerate(shape) if same(size, 1)]


def _is_inferred(size: Any) -> bool:
    return isinstance(size, int) and size == -1


def _divides(divisor: Size, size: Size) -> bool:
    return isinstance(divisor, int) and isinstance(size, int) and divisor > 0 and size % divisor == 0
