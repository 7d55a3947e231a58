"""Chooses what is saved: nothing changes where a step fits; else the cheapest trades that make it fit.

The bytes of a step are those of its inputs (parameters, buffers, the batch), of the states of an optimizer, and the
peak of its values, gradients among them. Seconds come from `spcompile.schedule.op_cost`, never from a clock: all ranks
choose alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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
    state = state_bytes(joint, wish.optimizer)
    peak = peak_of(joint, saved)
    as_it_was = state + peak.bytes
    if not wish.least and (wish.bytes is None or as_it_was <= ROOM * wish.bytes):
        return MemoryPlan(tuple(saved), (), (), None, peak, state, as_it_was, wish.bytes)
    blocks, trades = all_trades(joint, saved, cost)
    search = _Search(joint, tuple(saved), trades)
    count = search.least() if wish.least or wish.bytes is None else search.first_below(int(ROOM * wish.bytes) - state)
    kept = saved_after(saved, trades[:count])
    again = made_again(joint, set(kept))
    chosen = tuple(trades[:count])
    return MemoryPlan(tuple(kept), tuple(again), chosen, blocks, search.peak(count), state, as_it_was, wish.bytes)


def state_bytes(joint: Joint, optimizer: Optimizer) -> int:
    """Of the inputs of a step and of the states of its optimizer."""
    states = [optimizer.bytes(numel_hint(x), x.element_size()) for x in (p.meta["val"] for p in joint.parameters)]
    return joint.input_bytes + sum(states)


def all_trades(
    joint: Joint, saved: Collection[fx.Node], cost: CostModel, *, block_inputs: bool = True
) -> tuple[Blocks, list[Trade]]:
    """All that can be traded, the cheapest first, and the blocks. block_inputs: whether their inputs can be, last."""
    cost = cost.of_one_graph()
    blocks = find_blocks(joint, cost.is_heavy)
    savings = Savings(joint, set(saved), blocks.inputs, lambda node: cost.work(node).seconds)
    return blocks, savings.trades() + (savings.of_block_inputs() if block_inputs else [])


def saved_after(saved: Iterable[fx.Node], trades: Iterable[Trade]) -> list[fx.Node]:
    """What is saved after these trades."""
    kept = dict.fromkeys(saved)
    for trade in trades:
        for node in trade.given_up:
            kept.pop(node, None)
        kept.update(dict.fromkeys(trade.instead))
    return list(kept)


class _Search:
    """How many of the trades to make."""

    def __init__(self, joint: Joint, saved: Sequence[fx.Node], trades: Sequence[Trade]) -> None:
        self.joint, self.saved, self.trades = joint, saved, trades
        self._peaks: dict[int, Peak] = {}

    def peak(self, count: int) -> Peak:
        """After so many trades."""
        if count not in self._peaks:
            self._peaks[count] = peak_of(self.joint, saved_after(self.saved, self.trades[:count]))
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
