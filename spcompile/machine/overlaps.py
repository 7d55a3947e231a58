"""Which elements of one layout of a dim stand where in another: what moves between ranks when a dim is laid out anew.

A dim may be a product whose first factor is laid out (`spcompile.machine.sequence`): then each index of that factor
stands for `unit` elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spcompile.machine.sequence import chunk_length, chunks_of, local_length

Size = Any  # int or SymInt


@dataclass(frozen=True)
class LaidOut:
    """A dim of `length` indices of `unit` elements each, over `degree` ranks."""

    length: Size
    unit: Size
    degree: int
    order: str

    @property
    def local(self) -> Size:
        """Elements that a rank holds, padding included."""
        return local_length(self.length, self.degree, self.order) * self.unit

    def stretches(self, rank: int) -> list[Stretch]:
        """What `rank` holds, padding included."""
        chunk = chunk_length(self.length, self.degree, self.order) * self.unit
        return [Stretch(c * chunk, i * chunk, chunk) for i, c in enumerate(chunks_of(rank, self.degree, self.order))]


class Stretch(NamedTuple):
    """`size` elements from position `first` of the whole dim on, which a rank holds from its element `start` on."""

    first: int
    start: int
    size: int


class Overlap(NamedTuple):
    """`size` elements: from `source` on in the tensor that has them, from `target` on in the one that gets them."""

    source: int
    target: int
    size: int


def overlaps(source: Sequence[Stretch], target: Sequence[Stretch], start: int, to: int, count: int) -> list[Overlap]:
    """Of `count` elements, which go from position `start` of one dim to `to` of another, those that both sides hold."""
    found = []
    for a in source:
        for b in target:
            first = max(start, a.first, b.first + start - to)
            stop = min(start + count, a.first + a.size, b.first + b.size + start - to)
            if first < stop:
                found.append(Overlap(first - a.first + a.start, first + to - start - b.first + b.start, stop - first))
    return found


def everything(size: int) -> list[Stretch]:
    """What each rank holds of a dim that is whole."""
    return [Stretch(0, 0, size)]
