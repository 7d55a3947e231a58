"""What a user wants to know first of a plan: does a step fit, what would make it fit, and how fast is it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.durations import ms_text
from spcompile.memory.account import Memory
from spcompile.schedule.timeline import Prediction

# What was done with values by kind of action.
_INSTEAD = {
    "recompute": "are made again instead of saved",
    "offload": "wait in the memory of the host",
    "tile": "never stand whole",
    "stage": "of heads are not there all at once",
}


@dataclass(frozen=True)
class Answers:
    """What a plan's memory and times mean. Figures are of one step without the optimizer.

    world: ranks in all. tokens: of the whole batch; None where the model has no sequence.
    flops, flops_full: that the model itself needs, with attention as masked and without its mask; what is made again
        does not count.
    peak: flops a second of all ranks, at best. optimizer: whose states count.
    ways: what was tried to make a step fit, and what it takes then.
    """

    world: int
    tokens: int | None
    flops: float
    flops_full: float
    peak: float
    optimizer: str
    ways: tuple[str, ...] = ()

    def tokens_per_second(self, seconds: float) -> float | None:
        """Of all ranks together."""
        return self.tokens / seconds if self.tokens is not None and seconds > 0 else None

    def mfu(self, seconds: float) -> tuple[float, float]:
        """Shares of the peak: with attention as masked, and without its mask."""
        return self.flops / seconds / self.peak, self.flops_full / seconds / self.peak

    def lines(self, memory: Memory, predicted: Prediction) -> Iterator[str]:
        """For the head of a report."""
        yield f"Memory     {self._memory(memory)}"
        for way in self.ways:
            yield f"To fit     {way}"
        seconds, sent, exposed = (predicted.total(name) for name in ("seconds", "communication", "exposed"))
        text = f"Speed      {ms_text(seconds)} ms a step"
        rate = self.tokens_per_second(seconds)
        if rate is not None:
            text += f", {rate:,.0f} tokens/s" + (f", {rate / self.world:,.0f} on each rank" if self.world > 1 else "")
        if seconds > 0:
            masked, full = self.mfu(seconds)
            text += f"; MFU {_share_text(masked)}"
            if _share_text(full) != _share_text(masked):
                text += f", {_share_text(full)} if masked scores count"
        if sent > 0:
            text += f"; {ms_text(exposed)} of {ms_text(sent)} ms communication are exposed"
        yield text

    def _memory(self, memory: Memory) -> str:
        total = memory.total_bytes
        takes = bytes_text(float(total)) if total.is_number else str(total)
        states = "without an optimizer" if self.optimizer == "none" else f"with the states of {self.optimizer}"
        if memory.budget_bytes is None:
            return f"{takes} on each rank, {states}; no limit is known"
        verdict = "fits" if memory.fits else "does not fit"
        text = f"{verdict}: {takes} of {bytes_text(memory.budget_bytes)} on each rank, {states}"
        again = sum(row.seconds for row in memory.actions)
        for kind, what in _INSTEAD.items():
            if found := sum(row.bytes for row in memory.actions if row.kind == kind):
                text += f"; {bytes_text(found)} {what}"
        return f"{text}, for {ms_text(again)} ms" if memory.actions else text

    def to_dict(self, memory: Memory, predicted: Prediction) -> dict[str, Any]:
        """JSON-able."""
        seconds = predicted.total("seconds")
        rate = self.tokens_per_second(seconds)
        masked, full = self.mfu(seconds) if seconds > 0 else (None, None)
        return {
            "fits": memory.fits,
            "to_fit": list(self.ways),
            "seconds": seconds,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self.world if rate is not None else None,
            "mfu_causal": masked,
            "mfu_full": full,
        }


def _share_text(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "below 1%"
