"""What is known of a value on the way from a sort to where its rows are put back.

Facts are about one sort of rows, or one call that picks some of them. `Seen` says that a call would see the order of
the rows of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx as fx

from spcompile.graph.sizes import Size
from spcompile.sharding.rules.shuffled import Pieces, Span


@dataclass(frozen=True)
class SortedRows:
    """Dim `dim` is in the order of the sort."""

    sort: fx.Node
    dim: int


@dataclass(frozen=True)
class GroupRows:
    """Dim `dim` has the sorted rows of group `number`, of `count` groups; all groups, if that is None."""

    sort: fx.Node
    dim: int
    number: int | None
    count: int


@dataclass(frozen=True)
class RowPlaces:
    """Numbers of unsorted rows, read as `pieces`, of which they count those of `span`. Dim `dim` is in sorted order.

    picked: there is a place of some of the rows only.
    """

    sort: fx.Node
    dim: int
    pieces: Pieces
    span: Span
    picked: bool = False

    @property
    def size(self) -> Size:
        """How many places there are."""
        return math.prod(self.pieces[slice(*self.span)])

    @property
    def is_whole(self) -> bool:
        """Whether each number is that of one row, and each row has one."""
        return self.span == (0, len(self.pieces)) and not self.picked


@dataclass(frozen=True)
class Ranks:
    """Of each unsorted row the number that it has among the sorted ones."""

    sort: fx.Node


@dataclass(frozen=True)
class Ends:
    """Where the groups of sorted rows end, or how many rows each has; also one of these numbers."""

    sort: fx.Node


@dataclass(frozen=True)
class RowCount:
    """How many rows were picked."""

    sort: fx.Node


Fact = SortedRows | GroupRows | RowPlaces | Ranks | Ends | RowCount
Facts = Mapping[fx.Node, Fact]


class Seen(Exception):
    """A call sees more than a rank's own rows."""
