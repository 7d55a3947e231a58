"""Candidates at full depth in order, with what people ask of them: memory, seconds, shares, use of the hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spcompile.machine.accelerators import Accelerator
from spcompile.planning.figures import Figures
from spcompile.planning.search import Result

ALIKE = 0.005  # of the time: nearer to one another, the tables cannot tell which is faster
_STEP = 3  # a backward takes two products for each of the forward


@dataclass(frozen=True)
class Ranked:
    """A candidate that could be compiled. seconds: of a step without the optimizer.

    mfu_causal, mfu_full: of the peak, what the model itself needs: what is made again does not count, and of attention
    what the mask leaves, or all. communication_share, exposed_share: of the step.
    """

    result: Result
    figures: Figures
    seconds: float
    tokens_per_second_per_gpu: float
    mfu_causal: float
    mfu_full: float
    communication_share: float
    exposed_share: float

    @property
    def fits(self) -> bool:
        """Whether it stays within the limit."""
        return self.result.fits


def ranked(results: Sequence[Result], world: int, tokens: int, accelerator: Accelerator, itemsize: int) -> list[Ranked]:
    """Those that fit first, the fastest first. tokens: of the whole batch. itemsize: of an element of products."""
    peak = accelerator.peak(itemsize) * world
    rows = []
    for result in results:
        found = result.figures
        if found is None:
            continue
        attention, full = (_STEP * (found.products + x) for x in (found.attention, found.attention_full))
        rows.append(
            Ranked(
                result,
                found,
                found.seconds,
                tokens / found.seconds / world,
                attention / found.seconds / peak,
                full / found.seconds / peak,
                found.communication / found.seconds,
                found.exposed / found.seconds,
            )
        )
    return sorted(rows, key=lambda row: (not row.fits, row.seconds if row.fits else row.figures.total))


def chosen(rows: Sequence[Ranked]) -> int:
    """The fastest that fits; of those that are as fast as the tables can tell, the one that takes least memory."""
    fitting = [row for row in rows if row.fits]
    alike = [row for row in fitting if row.seconds <= fitting[0].seconds * (1 + ALIKE)]
    return rows.index(min(alike, key=lambda row: row.figures.total))


def why(rows: Sequence[Ranked], choice: int) -> str:
    """Why this one, in a sentence or two."""
    best = rows[choice]
    fitting = [row for row in rows if row.fits]
    text = f"{candidate_name(best)} takes {best.seconds:.4g} s a step, the least of {len(fitting)} that fit"
    if len(fitting) == 1:
        text = f"{candidate_name(best)} is the only one that fits"
    elif best is not fitting[0]:
        text = f"{candidate_name(best)} takes the least memory of those within {ALIKE:.1%} of the fastest"
    if best.figures.again > 0:
        text += f"; {1e3 * best.figures.again:.3g} ms of it make values again to stay within memory"
    return text


def what_it_would_take(rows: Sequence[Ranked], choice: int) -> str:
    """The best candidate on another mesh or with another attention, and what would make it the choice."""
    best = rows[choice]
    others = [row for row in rows if row is not best and _way(row) != _way(best)]
    if not others:
        return ""
    other = others[0]
    if not other.fits:
        return f"{candidate_name(other)} takes {other.figures.total / 2**30:.1f} GiB and does not fit"
    late = other.seconds - best.seconds
    text = f"{candidate_name(other)}, {late / best.seconds:+.1%} in time"
    if late <= 0:
        return f"{text}, would be preferred if memory mattered less than {-late * 1e3:.3g} ms a step"
    if other.figures.exposed > late:
        share = late / other.figures.exposed
        return f"{text}, would be preferred if {share:.0%} less of its communication were exposed"
    if other.figures.again > late:
        return f"{text}, would be preferred if memory allowed it to make again {late * 1e3:.3g} ms less"
    return f"{text}, computes longer: no faster link and no more memory would make it the choice"


def _way(row: Ranked) -> object:
    return row.result.candidate.mesh, row.result.candidate.attention


def candidate_name(row: Ranked) -> str:
    """`tp=2 cp=4, ulysses`."""
    return row.result.candidate.name
