"""Measured times of growing amounts of work, and what lies between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class TimeCurve:
    """points: (amount, seconds), both growing. Between them logarithms are linear; beyond the ends rates stay."""

    points: tuple[tuple[float, float], ...]

    def seconds(self, amount: float) -> float:
        """Of so much work. Below the first point the time of the first: it is what starting takes."""
        first, last = self.points[0], self.points[-1]
        if amount <= first[0]:
            return first[1] if amount > 0 else 0.0
        if amount >= last[0]:
            return last[1] * amount / last[0]
        for (low, before), (high, after) in pairwise(self.points):
            if amount <= high:
                part = math.log(amount / low) / math.log(high / low)
                return math.exp(math.log(before) + part * math.log(after / before))
        raise AssertionError("a curve that does not grow")

    @property
    def best_rate(self) -> float:
        """The most work per second."""
        return max(amount / seconds for amount, seconds in self.points)

    @property
    def grows(self) -> bool:
        """Whether both columns do."""
        return all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(self.points))

    @classmethod
    def through(cls, points: list[tuple[float, float]]) -> TimeCurve:
        """Of measurements: a time that is below that of less work is noise, and becomes a little more than that."""
        found: list[tuple[float, float]] = []
        for amount, seconds in sorted(points):
            least = found[-1][1] * (1 + 1e-6) if found else 0.0
            found.append((amount, max(seconds, least)))
        return cls(tuple(found))
