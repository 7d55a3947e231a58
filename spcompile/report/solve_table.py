"""What `spcompile plan --solve` prints: costs as expressions of the length, and lengths at which a choice changes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import sympy
from rich.console import Console
from rich.table import Table

from spcompile.machine.byte_sizes import bytes_text
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.plain_text import one_line
from spcompile.planning.cost_curves import Curve, Point, S, at_depth, crossings, json_of, longest_that_fits, rounded

SOLVED_SCHEMA_VERSION = 1
MOST_SOLVED = 1 << 30  # tokens
_WIDTH = 170


@dataclass(frozen=True)
class SolvedLengths:
    """curves: of each strategy with nothing made again, then as it takes least. points: where programs were made.

    layers: equal blocks of the graph, `L` of the expressions. refused: strategy -> why there is no such program.
    """

    model: str
    layers: int
    entries: int
    options: Options
    points: Sequence[Point]
    curves: Sequence[Curve]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def shortest(self) -> int:
        """Of the lengths that were compiled."""
        return min(point.tokens for point in self.points)

    @property
    def longest(self) -> int:
        """Of the lengths that were compiled."""
        return max(point.tokens for point in self.points)

    def of_length(self, expression: sympy.Expr) -> sympy.Expr:
        """An expression for this model and batch."""
        return at_depth(expression, self.layers, self.entries)

    def longest_context(self, curve: Curve) -> int | None:
        """Tokens up to which a step fits; None: none do."""
        limit = Wish.of(self.options, curve.candidate.ranks).bytes
        if limit is None:
            return MOST_SOLVED
        return longest_that_fits(self.of_length(curve.total), limit, MOST_SOLVED)

    def changes(self) -> list[tuple[str, str, list[tuple[int, bool]], bool]]:
        """(one, other, lengths at which it changes which is faster, whether one is at the shortest length)."""
        found = []
        for one, other in self._pairs():
            a, b = self.of_length(one.seconds), self.of_length(other.seconds)
            first = bool((a - b).subs(S, self.shortest) < 0)
            at = crossings(a, b, self.shortest, self.longest)
            found.append((one.candidate.name, other.candidate.name, at, first))
        return found

    def _pairs(self) -> Iterator[tuple[Curve, Curve]]:
        """What is compared in time, with nothing made again: ring and Ulysses, Megatron with and without SP."""
        curves = [curve for curve in self.curves if not curve.least]
        for _, group in groupby(curves, key=lambda curve: curve.candidate.mesh):
            same = list(group)
            rings = [curve for curve in same if curve.candidate.attention == "ring"]
            for ring in rings:
                yield from ((ring, other) for other in same if other.candidate.attention not in ("ring", "auto"))
            with_sp = [curve for curve in same if curve.candidate.attention == "auto" and curve.candidate.megatron_sp]
            for curve in with_sp:
                yield from ((curve, other) for other in same if not other.candidate.megatron_sp)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; expressions in S, B and L as text."""
        return {
            "schema_version": SOLVED_SCHEMA_VERSION,
            "model": self.model,
            "layers": self.layers,
            "entries": self.entries,
            "compiled": [{"tokens": point.tokens, "entries": point.entries} for point in self.points],
            "strategies": [
                {
                    "name": curve.candidate.name,
                    "mesh": dict(curve.candidate.mesh),
                    "ranks": curve.candidate.ranks,
                    "made_again": "as with least memory" if curve.least else "nothing",
                    "fits_up_to_tokens": self.longest_context(curve),
                    **json_of(curve),
                }
                for curve in self.curves
            ],
            "changes": [
                {"one": one, "other": other, "one_is_faster_at_first": first, "at_tokens": [place for place, _ in at]}
                for one, other, at, first in self.changes()
            ],
            "refused": self.refused,
        }

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, highlight=False, color_system=None, markup=False, emoji=False)
        console.print(self._table())
        for line in self._lines():
            console.print(line, soft_wrap=True)
        return out.getvalue()

    def _table(self) -> Table:
        limit = Wish.of(self.options, 1).bytes
        of = f", {bytes_text(limit)} on each rank" if limit is not None else ""
        title = one_line(f"{self.model}, L = {self.layers} layers, B = {self.entries}, S tokens{of}")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("ranks", "strategy", "fits up to", "made again", "saved bytes", "seconds"):
            table.add_column(name, justify="right" if name in ("ranks", "fits up to", "made again") else "left")
        for plain, least in zip(self.curves[::2], self.curves[1::2], strict=True):
            fits = [_tokens(self.longest_context(curve)) for curve in (plain, least)]
            expressions = [str(rounded(self.of_length(x))) for x in (plain.saved, plain.seconds)]
            table.add_row(str(plain.candidate.ranks), plain.candidate.name, *fits, *expressions)
        return table

    def _lines(self) -> Iterator[str]:
        yield ""
        for one, other, at, first in self.changes():
            faster = one if first else other
            if not at:
                yield f"Time       {faster} beats {other if first else one} at all lengths {self._range()}"
            for place, one_behind in at:
                now, before = (one, other) if one_behind else (other, one)
                yield f"Time       from {place:,} tokens on {now} beats {before}"
        for ranks, group in groupby(self.curves, key=lambda curve: curve.candidate.ranks):
            reach = [(self.longest_context(curve) or 0, curve) for curve in group]
            tokens, best = max(reach, key=lambda pair: pair[0])
            yield f"Context    {ranks} ranks: up to {_tokens(tokens or None)} tokens, {best.candidate.name}"
        for name, error in self.refused.items():
            yield f"Left out   {name}: {one_line(error.splitlines()[0])}"
        compiled = ", ".join(f"S={point.tokens:,} B={point.entries}" for point in self.points)
        yield f"Assumed    programs of {compiled} were compiled; the expressions go through them, and on beyond"
        yield "Assumed    times are of steps that make nothing again and leave the optimizer out"

    def _range(self) -> str:
        return f"from {self.shortest:,} to {self.longest:,} tokens"


def _tokens(count: int | None) -> str:
    if count is None:
        return "none"
    return "no limit" if count >= MOST_SOLVED else f"{count:,}"
