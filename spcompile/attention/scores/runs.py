"""Where the local rows of a tensor are in the global sequence: a short list of runs of ascending positions.

Attention over any order of the sequence becomes attention over pairs of runs, most of which a mask either allows or
forbids as a whole. All of this is host arithmetic; only positions given as a tensor on a GPU cost a synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spcompile.machine.sequence import chunk_length, chunks_of

if TYPE_CHECKING:
    from torch import Tensor

PADDING = torch.iinfo(torch.int32).max  # the position of an element that is none
MAX_RUNS = 16  # pairs of runs are visited one by one: an order with more runs is treated as one run with gaps


@dataclass(frozen=True, eq=False)
class Run:
    """`length` consecutive local elements at ascending global positions from `first` to `last`.

    gaps: int64 [length] on the host, the positions themselves where they are not consecutive; else None.
    """

    start: int
    length: int
    first: int
    last: int
    gaps: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length

    def positions(self, device: torch.device) -> Tensor:
        """int32 [length]."""
        if self.gaps is not None:
            return self.gaps.to(device, torch.int32)
        return torch.arange(self.first, self.last + 1, dtype=torch.int32, device=device)

    def narrow(self, offset: int, length: int) -> Run:
        """The part of `length` > 0 elements from the run's element `offset` on."""
        if self.gaps is None:
            first = self.first + offset
            return Run(self.start + offset, length, first, first + length - 1)
        gaps = self.gaps[offset : offset + length]
        return Run(self.start + offset, length, int(gaps[0]), int(gaps[-1]), gaps)

    def between(self, first: int, last: int | None) -> Run | None:
        """The part at positions first..last, both included; None if there is none."""
        last = self.last if last is None else min(last, self.last)
        first = max(first, self.first)
        if self.gaps is None:
            offset, stop = first - self.first, last + 1 - self.first
        else:
            offset = int(torch.searchsorted(self.gaps, first))
            stop = int(torch.searchsorted(self.gaps, last, right=True))
        return self.narrow(offset, stop - offset) if stop > offset else None

    def select(self, x: Tensor, dim: int) -> Tensor:
        """The elements at this run's positions of `x`, whose `dim` is the global sequence; a view without gaps.

        Rows past its end are padding of a layout: they get the last element.
        """
        end = x.shape[dim] - 1
        if self.gaps is None and self.last <= end:
            return x.narrow(dim, self.first, self.length)
        return x.index_select(dim, self.positions(x.device).clamp(max=end))


def natural_runs(length: int) -> tuple[Run, ...]:
    """All of a sequence in its natural order."""
    return (Run(0, length, 0, length - 1),) if length else ()


def shard_runs(length: int, rank: int, degree: int, order: str, inner: int = 1) -> tuple[Run, ...]:
    """The runs of `rank`'s shard of a sequence laid out by `spcompile.machine.sequence`, padding left out.

    inner: the sequence is laid out over so many times more ranks, and this is what that many neighbours hold together.
    """
    chunk = inner * chunk_length(length, inner * degree, order)
    runs = []
    for index, number in enumerate(chunks_of(rank, degree, order)):
        first = number * chunk
        last = min(first + chunk, length) - 1
        if last >= first:
            runs.append(Run(index * chunk, last - first + 1, first, last))
    return tuple(runs)


def runs_of(positions: Tensor) -> tuple[Tensor | None, tuple[Run, ...]]:
    """The runs of int [S] positions in any order: (order, runs). Elements at PADDING are in none.

    order: int64 [S] that sorts the local elements by position, to which the runs refer; None if they are sorted.
    """
    host = positions.detach().to("cpu", torch.int64)
    order = None
    if bool((host.diff() < 0).any()):
        host, order = host.sort(stable=True)
        order = order.to(positions.device)
    host = host[host != PADDING]
    if host.numel() == 0:
        return order, ()
    starts = [0, *((host.diff() != 1).nonzero().flatten() + 1).tolist()]
    if len(starts) > MAX_RUNS:
        return order, (Run(0, len(host), int(host[0]), int(host[-1]), host),)
    stops = [*starts[1:], len(host)]
    runs = [Run(a, b - a, int(host[a]), int(host[b - 1])) for a, b in zip(starts, stops, strict=True)]
    return order, tuple(runs)
