"""How many trades to make, and how much to keep in the memory of the host: what costs least of all that fits.

Trades are made in their order, the cheapest first, so that a plan is two numbers: of trades, and of values that go to
the host. Every peak that is looked at costs a walk over the graph; how many are is bounded.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.fx as fx

from spcompile.memory.host_plan import Clock
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Away, Peak, orders_of, peak_of
from spcompile.memory.row_tiles import WidePart, find_wide_parts, rows_and_width
from spcompile.memory.stream_blocks import Blocks
from spcompile.memory.trades import Trade, saved_after
from spcompile.schedule.op_cost import CostModel, bytes_of

_LOOKS = 12  # numbers of trades that are tried where the least peak is searched
_LAST_LOOKS = 6  # and of the last ones, each of which gives up half of the inputs of blocks
_TILES = 8  # into which rows are cut
_HOST_LOOKS = 6  # numbers of trades beside which the host is asked
_HOST_TRIES = 2  # of these, how many are looked at closely


@dataclass(frozen=True)
class PlanChoice:
    """A number of trades, and what the host keeps beside. seconds: that both cost a step."""

    count: int
    away: Away | None
    peak: Peak
    seconds: float

    @property
    def host_bytes(self) -> int:
        return self.away.bytes if self.away is not None else 0


@dataclass(frozen=True)
class Tiles:
    """Of rows, over which wide parts run.

    count: into how many. parts: the first call of each part. bytes: of the largest that no longer stand whole.
    seconds: that it costs a step.
    """

    count: int
    parts: tuple[fx.Node, ...]
    bytes: int
    seconds: float


class PlanSearch:
    """How many of the trades to make, and how much to keep in the memory of the host."""

    def __init__(
        self, joint: Joint, saved: Sequence[fx.Node], trades: Sequence[Trade], blocks: Blocks, cost: CostModel
    ) -> None:
        self.joint, self.saved, self.trades, self.blocks, self.cost = joint, saved, trades, blocks, cost
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

    def plain(self, count: int) -> PlanChoice:
        """So many trades and nothing in the memory of the host."""
        return PlanChoice(count, None, self.peak(count), self._seconds(count))

    def over_tiles(self, limit: int, host: int) -> tuple[PlanChoice, Tiles] | None:
        """`cheapest` where wide parts run over tiles; None where there are none."""
        joint = replace(self.joint, tiles=_TILES)
        search = PlanSearch(joint, self.saved, self.trades, self.blocks, self.cost)
        chosen = search.cheapest(limit, host)
        saved = search.saved_after(chosen.count)
        kept = {joint.storage[node] for node in (*saved, *joint.returned)}
        parts = [
            part
            for order in orders_of(joint, saved)
            for part in find_wide_parts(order, lambda node: joint.storage[node] in kept)
        ]
        if not parts:
            return None
        wide = max(sum(joint.bytes_of[node] for node in part.tiled_away) for part in parts)
        seconds = sum(self._seconds_of_tiles(part) for part in parts)
        return chosen, Tiles(_TILES, tuple(part.inner[0] for part in parts), wide - wide // _TILES, seconds)

    def _seconds_of_tiles(self, part: WidePart) -> float:
        """More kernels, each of which reads its weights, or adds to a sum."""
        accelerator = self.cost.accelerator
        again = [node for product in part.products for node in product.all_input_nodes if node not in part.inner]
        again = [node for node in again if (shape := rows_and_width(node)) is None or shape[0] != part.rows]
        moved = sum(bytes_of(node) for node in (*again, *part.sums, *part.sums))
        kernels = len(part.calls) * accelerator.seconds_per_kernel
        return self._seconds_of_copies(part) + (_TILES - 1) * (kernels + moved / accelerator.bytes_per_second)

    def _seconds_of_copies(self, part: WidePart) -> float:
        """What is made again twice: for the gradient, and for a result of the forward that comes long before it."""
        again = [node for node in part.inner if node in self.joint.is_forward]
        if len(again) == len(part.inner) or not any(node in self.joint.is_forward for node in part.narrow):
            return 0.0
        return sum(self.cost.work(node).seconds for node in again)

    def cheapest(self, limit: int, host: int) -> PlanChoice:
        """What costs least of all whose peak is within the limit, with at most `host` bytes in the host's memory.

        Where nothing is, what needs least of the host; where the host does not help, what has the least peak.
        """
        count = self.first_below(limit)
        plain = self.plain(count)
        if not host:
            return plain
        best = plain if plain.peak.bytes <= limit else None
        beyond: list[PlanChoice] = []
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

    def _with_host(self, count: int, limit: int) -> PlanChoice | None:
        """So many trades, and by bytes alone enough in the host's memory; None where that needs none or is too much."""
        wanted = self.peak(count).bytes - limit
        saved = self.saved_after(count)
        clock = Clock.of(self.joint, saved, self.cost)
        values = clock.can_go()
        sizes = [self.joint.bytes_of[self.joint.storage[node]] for node in values]
        if wanted <= 0 or sum(sizes) < wanted:
            return None
        enough = bisect.bisect_left(list(itertools.accumulate(sizes)), wanted) + 1
        away = clock.away(values[:enough])
        return PlanChoice(count, away, self.peak(count), self._seconds(count) + away.seconds)

    def _just_enough(self, offer: PlanChoice, limit: int) -> PlanChoice:
        """As many trades as the offer makes, and the fewest values in the host's memory with which it fits."""
        assert offer.away is not None
        saved = self.saved_after(offer.count)
        clock = Clock.of(self.joint, saved, self.cost)
        values = clock.can_go()

        def of(number: int) -> PlanChoice:
            away = clock.away(values[:number])
            peak = peak_of(self.joint, saved, away)
            return PlanChoice(offer.count, away, peak, self._seconds(offer.count) + away.seconds)

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
