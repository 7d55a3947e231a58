"""How one attention is spread over the ranks of an axis: as a ring, by heads, or by heads inside a ring."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """Ulysses over `inner` neighbours, a ring of `outer` such groups.

    As text, which graphs carry: "ring" (inner = 1), "ulysses" (outer = 1), else "hybrid UxR", Ulysses times ring.
    """

    inner: int
    outer: int

    def __str__(self) -> str:
        if self.inner == 1:
            return "ring"
        return "ulysses" if self.outer == 1 else f"hybrid {self.inner}x{self.outer}"

    @staticmethod
    def parse(text: str, degree: int) -> Strategy:
        """The strategy over `degree` ranks that `str` wrote as `text`."""
        if text in ("ring", "ulysses"):
            return Strategy(1, degree) if text == "ring" else Strategy(degree, 1)
        found = re.fullmatch(r"hybrid (\d+)x(\d+)", text)
        assert found is not None, text
        strategy = Strategy(int(found[1]), int(found[2]))
        assert strategy.inner * strategy.outer == degree, (text, degree)
        return strategy

    @staticmethod
    def hybrids(degree: int) -> list[Strategy]:
        """All with both inside `degree` ranks, the smallest `inner` first."""
        return [Strategy(n, degree // n) for n in range(2, degree) if degree % n == 0]
