"""Chooses what is saved: nothing changes where a step fits; else the cheapest trades that make it fit.

The bytes of a step are those of its inputs (parameters, buffers, the batch), of the states of an optimizer, and the
peak of its values, gradients among them. Seconds come from `spcompile.schedule.op_cost`, never from a clock: all ranks
choose alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch.fx as fx

from spcompile.graph.sizes import numel_hint
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.optimizers import OPTIMIZERS, Optimizer
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Peak, peak_of
from spcompile.memory.stream_blocks import Blocks, find_blocks
from spcompile.memory.trades import Savings, Trade, made_again
from spcompile.options import Options, bytes_of_option
from spcompile.schedule.op_cost import CostModel

_LOOKS = 12  # numbers of trades that are tried where the least peak is searched
_LAST_LOOKS = 6  # and of the last ones, each of which gives up half of the inputs of blocks
ROOM = 0.98  # of the limit: what overlap keeps alive longer, behind the plan, takes the rest


@dataclass(frozen=True)
class Wish:
    """What the user asked for. bytes: of everything on one rank; None: no limit. least: as few bytes as can be."""

    bytes: int | None = None
    least: bool = False
    optimizer: Optimizer = OPTIMIZERS["adamw"]

    @property
    def is_bounded(self) -> bool:
        """Whether there is anything to plan."""
        return self.least or self.bytes is not None

    @classmethod
    def of(cls, options: Options) -> Wish:
        """From the options `memory` and `optimizer`. "auto" is what the accelerator has, less a margin."""
        asked, optimizer = options.memory, options.states
        if asked == "auto":
            return cls(ACCELERATORS[options.accelerator].usable_memory, False, optimizer)
        if asked in ("speed", "min"):
            return cls(None, asked == "min", optimizer)
        return cls(bytes_of_option(asked), False, optimizer)


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen. trades: empty where nothing changes. again: calls of the forward that the backward runs.

    state_bytes: of inputs and of the optimizer. as_it_was: `total` without trades. limit: of `total`.
    """

    saved: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...]
    trades: tuple[Trade, ...]
    blocks: Blocks | None
    peak: Peak
    state_bytes: int
    as_it_was: int
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes of everything on one rank when most is alive."""
        return self.state_bytes + self.peak.bytes

    @property
    def seconds(self) -> float:
        """That the trades cost a step."""
        return sum(trade.seconds for trade in self.trades)

    @property
    def fits(self) -> bool:
        """Whether everything stays below the limit."""
        return self.limit is None or self.total <= self.limit


def plan_memory(joint: Joint, saved: Collection[fx.Node], cost: CostModel, wish: Wish) -> MemoryPlan:
    """saved: what the partitioner would save."""
    state = joint.input_bytes + sum(_state_bytes(node, wish.optimizer) for node in joint.parameters)
    peak = peak_of(joint, saved)
    as_it_was = state + peak.bytes
    if not wish.least and (wish.bytes is None or as_it_was <= ROOM * wish.bytes):
        return MemoryPlan(tuple(saved), (), (), None, peak, state, as_it_was, wish.bytes)
    cost = cost.of_one_graph()
    blocks = find_blocks(joint, cost.is_heavy)
    savings = Savings(joint, set(saved), blocks.inputs, lambda node: cost.work(node).seconds)
    search = _Search(joint, tuple(saved), savings.trades())
    count = search.least() if wish.least or wish.bytes is None else search.first_below(int(ROOM * wish.bytes) - state)
    kept = search.saved_after(count)
    again = made_again(joint, set(kept))
    chosen = tuple(search.trades[:count])
    return MemoryPlan(tuple(kept), tuple(again), chosen, blocks, search.peak(count), state, as_it_was, wish.bytes)


def _state_bytes(parameter: fx.Node, optimizer: Optimizer) -> int:
    value = parameter.meta["val"]
    return optimizer.bytes(numel_hint(value), value.element_size())


class _Search:
    """How many of the trades to make."""

    def __init__(self, joint: Joint, saved: Sequence[fx.Node], trades: Sequence[Trade]) -> None:
        self.joint, self.saved, self.trades = joint, saved, trades
        self._peaks: dict[int, Peak] = {}

    def saved_after(self, count: int) -> list[fx.Node]:
        """What is saved after so many trades."""
        saved = dict.fromkeys(self.saved)
        for trade in self.trades[:count]:
            for node in trade.given_up:
                del saved[node]
            saved.update(dict.fromkeys(trade.instead))
        return list(saved)

    def peak(self, count: int) -> Peak:
        """After so many trades."""
        if count not in self._peaks:
            self._peaks[count] = peak_of(self.joint, self.saved_after(count))
        return self._peaks[count]

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
