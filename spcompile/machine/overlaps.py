"""Which elements of one layout of a dim stand where in another: what moves between ranks when a dim is laid out anew.

A dim may be a product whose first factor is laid out (`spcompile.machine.sequence`): then each index of that factor
stands for `unit` elements. A layout may also hold elements more than once, as windows that overlap do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from spcompile.machine.sequence import chunk_length, chunks_of, chunks_per_rank, local_length

Size = Any  # int or SymInt


class Layout(Protocol):
    """Who holds which elements of a dim."""

    @property
    def local(self) -> Size:
        """Elements that a rank holds, padding included."""

    def stretches(self, rank: int) -> list[Stretch]:
        """What `rank` holds, padding included."""


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


@dataclass(frozen=True)
class Windows:
    """What is read to make a dim that is laid out as `made`: index i of it is made of `extent` elements of another dim,
    from `step` * i - `before` on. Beyond the ends of that dim there is nothing.

    A rank holds for each of its chunks the windows of that chunk, with what they have in common once.
    """

    made: LaidOut
    step: Size
    before: Size
    extent: Size

    @property
    def chunk(self) -> Size:
        """Elements that the windows of one chunk span."""
        return (chunk_length(self.made.length, self.made.degree, self.made.order) * self.made.unit - 1) * self.step + (
            self.extent
        )

    @property
    def local(self) -> Size:
        """Elements that a rank holds."""
        return chunks_per_rank(self.made.order) * self.chunk

    def stretches(self, rank: int) -> list[Stretch]:
        """What `rank` holds."""
        size = self.chunk
        return [
            Stretch(first * self.step - self.before, i * size, size)
            for i, (first, _, _) in enumerate(self.made.stretches(rank))
        ]


@dataclass(frozen=True)
class MessagePlan:
    """What every rank sends every other where `count` elements go from position `start` of a dim to `to` of another."""

    old: Layout
    new: Layout
    start: int
    to: int
    count: int
    degree: int

    def between(self, source: int, target: int) -> list[Overlap]:
        """From rank to rank, ascending."""
        return overlaps(self.old.stretches(source), self.new.stretches(target), self.start, self.to, self.count)

    def sent(self, rank: int) -> int:
        """Elements that leave a rank."""
        others = (r for r in range(self.degree) if r != rank)
        return sum(piece.size for other in others for piece in self.between(rank, other))

    @property
    def most_sent(self) -> int:
        """Elements that leave the rank that sends most."""
        return max(self.sent(rank) for rank in range(self.degree))


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
