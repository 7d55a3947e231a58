"""Numbers that grow by the same with each equal layer: from two depths, at a third."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import sympy

Made = TypeVar("Made")


class NotAlike(Exception):
    """The two depths do not say the same of their layers."""


@dataclass(frozen=True)
class Line:
    """A line through what two depths take, at a third. steps: how often what the second has more."""

    steps: sympy.Rational

    def at(self, few: Any, more: Any) -> Any:
        """Of numbers or sizes; whole ones stay whole."""
        if isinstance(few, float) or isinstance(more, float):
            return float(few + (more - few) * float(self.steps))
        found = sympy.expand(few + (more - few) * self.steps)
        if isinstance(few, int) and isinstance(more, int):
            return round(float(found)) if not found.is_Integer else int(found)
        return found

    def rows(
        self,
        few: Iterable[Made],
        more: Iterable[Made],
        kind: Callable[[Made], Hashable],
        fields: Sequence[str],
    ) -> list[Made]:
        """Rows in the order of the second, each of a kind of its own, which the first may not have.

        Raises:
            NotAlike: two rows are of one kind, or the first has a kind that the second has not.
        """
        before_rows, after_rows = list(few), list(more)
        first = {kind(row): row for row in before_rows}
        kinds = {kind(row) for row in after_rows}
        if len(first) < len(before_rows) or len(kinds) < len(after_rows) or not first.keys() <= kinds:
            raise NotAlike
        found = []
        for row in after_rows:
            before: Any = first.get(kind(row))
            values = {f: self.at(getattr(before, f) if before is not None else 0, getattr(row, f)) for f in fields}
            found.append(replace(row, **values))  # type: ignore[type-var]
        return found
