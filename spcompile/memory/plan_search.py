"""How many trades to make, how much to keep in the memory of the host, over how many tiles wide parts run: together.

Trades are made in their order, the cheapest first, so that a plan is three numbers: of trades, of values that go to
the host, and of tiles. Every peak that is looked at costs a walk over the graph; how many are is bounded.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch.fx as fx

from spcompile.memory.host_plan import Clock
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Away, Peak, peak_of, walk_of
from spcompile.memory.row_tiles import WidePart, rows_and_width
from spcompile.memory.stream_blocks import Blocks
from spcompile.memory.trades import Trade, saved_after
from spcompile.schedule.op_cost import CostModel, bytes_of

CHEAP = 0.01  # of a step: a plan that fits and costs no more is taken as it is
_LOOKS = 12  # numbers of trades that are tried where the least peak is searched
_LAST_LOOKS = 6  # and of the last ones, each of which gives up half of the inputs of blocks
_TILES = (8, 32)  # into how many rows are cut; the second only where nothing else fits
_HOST_LOOKS = 6  # numbers of trades beside which the host is asked
_HOST_TRIES = 2  # of these, how many are looked at closely, where one of them fits


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


@dataclass(frozen=True)
class PlanChoice:
    """A number of trades, what the host keeps beside, and tiles. seconds: that all of them cost a step."""

    count: int
    away: Away | None
    peak: Peak
    seconds: float
    saved: tuple[fx.Node, ...]
    tiles: Tiles | None = None

    @property
    def host_bytes(self) -> int:
        return self.away.bytes if self.away is not None else 0


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
        self.clocks: dict[int, Clock] = {}

    def saved_after(self, count: int) -> list[fx.Node]:
        """What is saved after so many trades."""
        return saved_after(self.saved, self.trades[:count])

    def peak(self, count: int) -> Peak:
        """After so many trades."""
        if count not in self._peaks:
            self._peaks[count] = peak_of(self.joint, self.saved_after(count))
        return self._peaks[count]

    def clock(self, count: int) -> Clock:
        """Of the copies to the host after so many trades. Tiles change nothing in it."""
        if count not in self.clocks:
            self.clocks[count] = Clock.of(self.joint, self.saved_after(count), self.cost)
        return self.clocks[count]

    def plain(self, count: int) -> PlanChoice:
        """So many trades and nothing in the memory of the host."""
        return PlanChoice(count, None, self.peak(count), self._seconds(count), tuple(self.saved_after(count)))

    def least_of_all(self, host: int) -> PlanChoice:
        """What has the least peak, with as much in the host's memory as fits into `host` bytes."""
        plain = self.plain(self.least())
        away = [self._all_that_can_go(look, host) for look in self._host_looks(self.before_inputs) if host]
        return min(plain, *away, key=lambda choice: (choice.peak.bytes, choice.seconds)) if away else plain

    def _host_looks(self, last: int) -> list[int]:
        return sorted({round(at * last / _HOST_LOOKS) for at in range(_HOST_LOOKS + 1)})

    def _all_that_can_go(self, count: int, host: int) -> PlanChoice:
        saved, clock = self.saved_after(count), self.clock(count)
        values = clock.can_go()
        sizes = [self.joint.bytes_of[self.joint.storage[node]] for node in values]
        away = clock.away(values[: bisect.bisect_right(list(itertools.accumulate(sizes)), host)])
        if not away.values:
            return self.plain(count)
        peak, seconds = peak_of(self.joint, saved, away), self._seconds(count) + away.seconds
        return PlanChoice(count, away, peak, seconds, tuple(saved))

    def over_tiles(self, tiles: int) -> PlanSearch | None:
        """The same where wide parts run over tiles; None where no part can, whatever is made again."""
        search = PlanSearch(self.joint.over_tiles(tiles), self.saved, self.trades, self.blocks, self.cost)
        search.clocks = self.clocks
        return search if search.with_tiles(search.plain(self.before_inputs)).tiles is not None else None

    def with_tiles(self, chosen: PlanChoice) -> PlanChoice:
        """A choice with the tiles that it runs over, and what they cost."""
        joint = self.joint
        if joint.tiles < 2:
            return chosen
        kept, walk = {joint.storage[node] for node in (*chosen.saved, *joint.returned)}, walk_of(joint, chosen.saved)
        parts = [
            part
            for order in (walk.forward, walk.backward)
            for part in joint.wide_parts.find(order.calls, lambda node: joint.storage[node] in kept)
        ]
        if not parts:
            return chosen
        wide = max(sum(joint.bytes_of[node] for node in part.tiled_away) for part in parts)
        seconds = sum(self._seconds_of_tiles(part) for part in parts)
        first_calls = tuple(part.inner[0] for part in parts)
        tiles = Tiles(joint.tiles, first_calls, wide - wide // joint.tiles, seconds)
        return replace(chosen, tiles=tiles, seconds=chosen.seconds + seconds)

    def _seconds_of_tiles(self, part: WidePart) -> float:
        """More kernels, each of which reads its weights, or adds to a sum."""
        accelerator = self.cost.accelerator
        again = [node for product in part.products for node in product.all_input_nodes if node not in part.inner]
        again = [node for node in again if (shape := rows_and_width(node)) is None or shape[0] != part.rows]
        moved = sum(bytes_of(node) for node in (*again, *part.sums, *part.sums))
        kernels = len(part.calls) * accelerator.seconds_per_kernel
        return self._seconds_of_copies(part) + (self.joint.tiles - 1) * (kernels + moved / accelerator.bytes_per_second)

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
        return self.with_tiles(self._cheapest(limit, host))

    def _cheapest(self, limit: int, host: int) -> PlanChoice:
        count = self.first_below(limit)
        plain = self.plain(count)
        if not host or (plain.peak.bytes <= limit and self.is_cheap(plain)):
            return plain
        best = plain if plain.peak.bytes <= limit else None
        beyond: list[PlanChoice] = []
        looks = self._host_looks(min(count, self.before_inputs) if best is not None else self.before_inputs)
        looks += [count] if best is None and count not in looks else []
        offers = [offer for look in looks if (offer := self._with_host(look, limit)) is not None]
        for number, offer in enumerate(sorted(offers, key=lambda offer: offer.seconds)):
            if best is not None and (number >= _HOST_TRIES or offer.seconds >= best.seconds):
                break
            found = self._just_enough(offer, limit)
            if found.peak.bytes > limit:
                continue
            if found.host_bytes > host:
                beyond.append(found)
            elif best is None or found.seconds < best.seconds:
                best = found
        return best or min(beyond, key=lambda choice: choice.host_bytes, default=None) or self.least_of_all(host)

    def _with_host(self, count: int, limit: int) -> PlanChoice | None:
        """So many trades, and by bytes alone enough in the host's memory; None where that needs none or is too much."""
        wanted = self.peak(count).bytes - limit
        saved, clock = self.saved_after(count), self.clock(count)
        values = clock.can_go()
        sizes = [self.joint.bytes_of[self.joint.storage[node]] for node in values]
        if wanted <= 0 or sum(sizes) < wanted:
            return None
        enough = bisect.bisect_left(list(itertools.accumulate(sizes)), wanted) + 1
        away = clock.away(values[:enough])
        return PlanChoice(count, away, self.peak(count), self._seconds(count) + away.seconds, tuple(saved))

    def _just_enough(self, offer: PlanChoice, limit: int) -> PlanChoice:
        """As many trades as the offer makes, and the fewest values in the host's memory with which it fits."""
        assert offer.away is not None
        saved, clock = offer.saved, self.clock(offer.count)
        values = clock.can_go()

        def of(number: int) -> PlanChoice:
            away = clock.away(values[:number])
            peak = peak_of(self.joint, saved, away)
            return PlanChoice(offer.count, away, peak, self._seconds(offer.count) + away.seconds, offer.saved)

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

    def is_cheap(self, chosen: PlanChoice) -> bool:
        """Whether a choice costs so little of a step that none could cost much less."""
        return chosen.seconds <= CHEAP * self.step_seconds

    @cached_property
    def step_seconds(self) -> float:
        """Of all calls of a step, where nothing is made again."""
        return sum(self.cost.work(node).seconds for node in (*self.joint.forward, *self.joint.backward))

    def _seconds(self, count: int) -> float:
        return sum(trade.seconds for trade in self.trades[:count])

    def first_below(self, limit: int) -> int:
        """The fewest trades whose peak is within the limit; where none is, those with the least peak.

        Where a peak falls by what a trade no longer saves, the next look is at the number that is just enough.
        """
        if self.peak(0).bytes <= limit:
            return 0
        often_enough = [count for count in (self.before_inputs, len(self.trades)) if self.peak(count).bytes <= limit]
        high = often_enough[0] if often_enough else self.least()
        if self.peak(high).bytes > limit:
            return high
        low = last = 0  # at `high` it fits, at `low` it does not
        by_bytes = True
        while high - low > 1:
            middle = (low + high) // 2
            if by_bytes:
                enough = bisect.bisect_left(self._freed, self._freed[last] + self.peak(last).bytes - limit)
                middle = min(max(enough, low + 1), high - 1)
            low, high = (low, middle) if self.peak(middle).bytes <= limit else (middle, high)
            last, by_bytes = middle, not by_bytes
        return high

    @cached_property
    def _freed(self) -> list[int]:
        """Bytes that so many trades no longer save."""
        return [0, *itertools.accumulate(trade.bytes for trade in self.trades)]

    def least(self) -> int:
        """A number of trades with the least peak: what is made again is alive, too, so that more is not always less."""
        last = len(self.trades)
        looks = {round(at * last / _LOOKS) for at in range(_LOOKS + 1)}
        looks |= set(range(max(0, last - _LAST_LOOKS), last))
        return min(sorted(looks), key=lambda count: self.peak(count).bytes)


def best_of_all(plain: PlanSearch, limit: int | None, host: int, tiles: int | None = None) -> PlanChoice:
    """What costs least of all that stays within a limit, by all levers at once; where nothing does, what misses least.

    limit: of the peak; None: the least that there is. host: bytes of the host's memory that may be taken. tiles: into
    how many rows are cut, 1 for none, where there is a limit; None: as it is best.
    """
    few, many = _TILES
    if limit is None:
        searches = [plain, *(tiled for count in _TILES if (tiled := plain.over_tiles(count)) is not None)]
        limit = min(search.least_of_all(host).peak.bytes for search in searches)
        return min((search.cheapest(limit, host) for search in searches), key=_preference(limit, host))
    if tiles is not None:
        return ((plain.over_tiles(tiles) if tiles > 1 else None) or plain).cheapest(limit, host)
    best, prefer = plain.cheapest(limit, host), _preference(limit, host)
    if best.peak.bytes <= limit and plain.is_cheap(best):
        return best
    if (tiled := plain.over_tiles(few)) is not None:
        best = min(best, tiled.cheapest(limit, host), key=prefer)
        if best.peak.bytes > limit and (tiled := plain.over_tiles(many)) is not None:
            best = min(best, tiled.cheapest(limit, host), key=prefer)
    return best


def _preference(limit: int, host: int) -> Callable[[PlanChoice], tuple[float, ...]]:
    """What fits goes first, then what costs least; of what does not fit, what takes least."""

    def rank(choice: PlanChoice) -> tuple[float, ...]:
        return max(0, choice.peak.bytes - limit), max(0, choice.host_bytes - host), choice.seconds

    return rank
