"""How many trades to make, and how much to keep in the memory of the host: what costs least of all that fits.

Trades are made in their order, the cheapest first, so that a plan is two numbers: of trades, and of values that go to
the host. Every peak that is looked at costs a walk over the graph; how many are is bounded.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch.fx as fx

from spcompile.memory.host_plan import Clock, can_go
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Away, Peak, peak_of
from spcompile.memory.stream_blocks import Blocks
from spcompile.memory.trades import Trade, saved_after
from spcompile.schedule.op_cost import CostModel

_LOOKS = 12  # numbers of trades that are tried where the least peak is searched
_LAST_LOOKS = 6  # and of the last ones, each of which gives up half of the inputs of blocks
_HOST_LOOKS = 6  # numbers of trades beside which the host is asked
_HOST_TRIES = 2  # of these, how many are looked at closely


@dataclass(frozen=True)
class Choice:
    """A number of trades, and what the host keeps beside. seconds: that both cost a step."""

    count: int
    away: Away | None
    peak: Peak
    seconds: float

    @property
    def host_bytes(self) -> int:
        return self.away.bytes if self.away is not None else 0


class PlanSearch:
    """How many of the trades to make, and how much to keep in the memory of the host."""

    def __init__(
        self, joint: Joint, saved: Sequence[fx.Node], trades: Sequence[Trade], blocks: Blocks, cost: CostModel
    ) -> None:
        self.joint, self.saved, self.trades, self.cost = joint, saved, trades, cost
        inputs = {joint.storage[node] for node in blocks.inputs}
        gives_inputs = (any(joint.storage[node] in inputs for node in trade.given_up) for trade in trades)
        self.before_inputs = next((at for at, gives in enumerate(gives_inputs) if gives), len(trades))
        self._peaks: dict[int, Peak] = {}

    def saved_after(self, count: int) -> list[fx.Node]:
        """What is saved after so many trades."""
        return saved_after(self.saved, self.trades[:count])

    def peak(self, count: int) -> Peak:
        """After so many trades."""
        if count not in self._peaks:
            self._peaks[count] = peak_of(self.joint, self.saved_after(count))
        return self._peaks[count]

    def plain(self, count: int) -> Choice:
        """So many trades and nothing in the memory of the host."""
        return Choice(count, None, self.peak(count), self._seconds(count))

    def cheapest(self, limit: int, host: int) -> Choice:
        """What costs least of all whose peak is within the limit, with at most `host` bytes in the host's memory.

        Where nothing is, what needs least of the host; where the host does not help, what has the least peak.
        """
        count = self.first_below(limit)
        plain = self.plain(count)
        if not host:
            return plain
        best = plain if plain.peak.bytes <= limit else None
        beyond: list[Choice] = []
        last = min(count, self.before_inputs) if best is not None else self.before_inputs
        looks = sorted({round(at * last / _HOST_LOOKS) for at in range(_HOST_LOOKS + 1)})
        offers = [offer for look in looks if (offer := self._with_host(look, limit)) is not None]
        for offer in sorted(offers, key=lambda offer: offer.seconds)[:_HOST_TRIES]:
            if best is not None and offer.seconds >= best.seconds:
                break
            found = self._just_enough(offer, limit)
            if found.peak.bytes > limit:
                continue
            if found.host_bytes > host:
                beyond.append(found)
            elif best is None or found.seconds < best.seconds:
                best = found
        return best or min(beyond, key=lambda choice: choice.host_bytes, default=plain)

    def _with_host(self, count: int, limit: int) -> Choice | None:
        """So many trades, and by bytes alone enough in the host's memory; None where that needs none or is too much."""
        wanted = self.peak(count).bytes - limit
        saved = self.saved_after(count)
        values = can_go(self.joint, saved)
        sizes = [self.joint.bytes_of[self.joint.storage[node]] for node in values]
        if wanted <= 0 or sum(sizes) < wanted:
            return None
        enough = bisect.bisect_left(list(itertools.accumulate(sizes)), wanted) + 1
        away = Clock.of(self.joint, saved, self.cost).away(values[:enough])
        return Choice(count, away, self.peak(count), self._seconds(count) + away.seconds)

    def _just_enough(self, offer: Choice, limit: int) -> Choice:
        """As many trades as the offer makes, and the fewest values in the host's memory with which it fits."""
        assert offer.away is not None
        saved = self.saved_after(offer.count)
        values, clock = can_go(self.joint, saved), Clock.of(self.joint, saved, self.cost)

        def of(number: int) -> Choice:
            away = clock.away(values[:number])
            peak = peak_of(self.joint, saved, away)
            return Choice(offer.count, away, peak, self._seconds(offer.count) + away.seconds)

        low, high = len(offer.away.values), len(values)
        found = of(high)
        if found.peak.bytes > limit:
            return found
        while low < high:
            middle = (low + high) // 2
            tried = of(middle)
            if tried.peak.bytes <= limit:
                found, high = tried, middle
            else:
                low = middle + 1
        return found

    def _seconds(self, count: int) -> float:
        return sum(trade.seconds for trade in self.trades[:count])

    def first_below(self, limit: int) -> int:
        """The fewest trades whose peak is within the limit; where none is, those with the least peak."""
        best = self.least()
        if self.peak(best).bytes > limit:
            return best
        low, high = 0, best  # at `high` it fits
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.peak(middle).bytes <= limit else (middle + 1, high)
        return low

    def least(self) -> int:
        """A number of trades with the least peak: what is made again is alive, too, so that more is not always less."""
        last = len(self.trades)
        looks = {round(at * last / _LOOKS) for at in range(_LOOKS + 1)}
        looks |= set(range(max(0, last - _LAST_LOOKS), last))
        return min(sorted(looks), key=lambda count: self.peak(count).bytes)
