"""What a candidate takes, as expressions of the length, the batch and the layers, and where two of them cross.

The expressions go exactly through compiled programs: two depths, three lengths, and one length with a second entry in
the batch. In tokens a step is constants (parameters), `S` (what is made once for all rows, such as angles), `S B`
(everything else) and `S^2 B` (scores of attention); each of the four is linear in the layers. Bytes are so exactly.
Seconds are between the lengths that were compiled, as far as what hides behind what does not change there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from spcompile.planning.candidates import Candidate
from spcompile.planning.figures import Figures

S, B, L = sympy.symbols("S B L", positive=True)
TERMS = (sympy.Integer(1), S, S * B, S**2 * B)
LENGTHS = 3  # of one entry
FACTOR = 4  # from one of these lengths to the next


@dataclass(frozen=True)
class Point:
    """A length and a batch at which programs are compiled."""

    tokens: int
    entries: int

    def at(self, expression: sympy.Expr) -> sympy.Expr:
        """An expression there."""
        return expression.subs({S: self.tokens, B: self.entries})


def points_from(tokens: int, entries: int) -> list[Point]:
    """Where programs are compiled: three lengths, and the shortest with twice the batch."""
    return [
        *(Point(tokens * FACTOR**n, entries) for n in range(LENGTHS)),
        Point(tokens, 2 * entries),
    ]


@dataclass(frozen=True)
class Curve:
    """A candidate, with nothing made again or, where `least`, as it takes least. Bytes of a rank, seconds of a step."""

    candidate: Candidate
    least: bool
    saved: sympy.Expr
    total: sympy.Expr
    seconds: sympy.Expr
    sent: sympy.Expr


def curve_through(
    candidate: Candidate,
    least: bool,
    points: Sequence[Point],
    depths: tuple[int, int],
    figures: Sequence[Sequence[Figures]],
) -> Curve:
    """Through the figures of programs of both depths at each point."""

    def through(read: Callable[[Figures], float]) -> sympy.Expr:
        return _through_points(points, depths, [(read(few), read(more)) for few, more in figures])

    peaks = [through(lambda found, at=at: found.peaks[at]) for at in range(3)]  # type: ignore[misc]
    held = through(lambda found: found.parameters + found.states)
    return Curve(
        candidate,
        least,
        through(lambda found: found.saved),
        sympy.Max(*(held + peak for peak in peaks)),
        through(lambda found: found.seconds),
        through(lambda found: found.sent_bytes),
    )


def _through_points(
    points: Sequence[Point], depths: tuple[int, int], values: Sequence[tuple[float, float]]
) -> sympy.Expr:
    system = sympy.Matrix([[point.at(term) for term in TERMS] for point in points])
    exact = [[_exact(value) for value in column] for column in zip(*values, strict=True)]
    few, more = (system.LUsolve(sympy.Matrix(column)) for column in exact)
    slope = (more - few) / (depths[1] - depths[0])
    of_none = few - slope * depths[0]
    total = sympy.Integer(0)
    for term, constant, per_layer in zip(TERMS, of_none, slope, strict=True):
        total += term * (constant + per_layer * L)
    return total


def _exact(value: float) -> sympy.Rational:
    """Bytes are whole numbers; seconds are taken to twelve digits."""
    return sympy.Integer(int(value)) if float(value).is_integer() else sympy.Rational(f"{value:.12e}")


def at_depth(expression: sympy.Expr, layers: int, entries: int) -> sympy.Expr:
    """An expression of `S` alone."""
    return expression.subs({L: layers, B: entries})


def longest_that_fits(total: sympy.Expr, limit: int, most: int) -> int | None:
    """The largest `S` at which `total(S)` is at most `limit`; None where none is; at most `most`.

    total: of `S` alone, growing with it.
    """
    number = sympy.lambdify(S, total, "math")
    if number(1) > limit:
        return None
    low, high = 1, most
    if number(high) <= limit:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if number(middle) <= limit else (low, middle)
    return low


def crossings(one: sympy.Expr, other: sympy.Expr, shortest: int, longest: int) -> list[tuple[int, bool]]:
    """Lengths between both at which it changes which of two expressions of `S` is less; and whether `one` is behind it.

    Both are polynomials of the second degree.
    """
    difference = sympy.Poly(sympy.expand(one - other), S)
    if difference.is_zero:
        return []
    found = []
    for root in sympy.Poly(difference, S).nroots(n=12):
        if abs(sympy.im(root)) < 1e-9 and shortest <= sympy.re(root) <= longest:
            place = int(sympy.re(root))
            found.append((place, bool(difference.eval(place * sympy.Rational(101, 100)) < 0)))
    return sorted(found)


def rounded(expression: sympy.Expr, digits: int = 3) -> sympy.Expr:
    """For people: coefficients with few digits."""
    return expression.xreplace(
        {
            number: sympy.Float(number, digits)
            for number in expression.atoms(sympy.Number)
            if abs(number) > 1e3 or not number.is_Integer
        }
    )


def json_of(curve: Curve) -> Mapping[str, Any]:
    """Expressions as text."""
    return {name: str(getattr(curve, name)) for name in ("saved", "total", "seconds", "sent")}
