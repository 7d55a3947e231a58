"""Chooses what is saved and where: nothing changes where a step fits; else the cheapest plan that makes it fit.

A plan makes so many trades, the cheapest first, keeps so many of what is still saved in the memory of the host, runs
wide parts over tiles or not, and heads in stages or not. A number of trades that leaves more to the host costs less to
make again, and may cost more to wait for.

The bytes of a step are those of its inputs (parameters, buffers, the batch), of the states of an optimizer, and the
peak of its values, gradients among them. Seconds come from `spcompile.schedule.op_cost`, never from a clock: all ranks
choose alike.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch.fx as fx

from spcompile.graph.sizes import numel_hint
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.links import RANKS_PER_NODE
from spcompile.machine.optimizers import OPTIMIZERS, Optimizer
from spcompile.memory.head_stages import HeadStages
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Away, Peak, highest, levels_of, most_by_part
from spcompile.memory.plan_search import PlanSearch, Tiles, best_of_all
from spcompile.memory.stream_blocks import Blocks, find_blocks
from spcompile.memory.trades import Savings, Trade, made_again
from spcompile.options import Options, bytes_of_option, host_bytes_of_option
from spcompile.schedule.op_cost import CostModel

ROOM = 0.98  # of the limit: what overlap keeps alive longer, behind the plan, takes the rest


@dataclass(frozen=True)
class Wish:
    """What the user asked for. bytes: of everything on one rank; None: no limit. least: as few bytes as can be.

    host: bytes of one rank in the memory of its host. ranks: that share a host.
    """

    bytes: int | None = None
    least: bool = False
    optimizer: Optimizer = OPTIMIZERS["adamw"]
    host: int = 0
    ranks: int = 1

    @property
    def is_bounded(self) -> bool:
        """Whether there is anything to plan."""
        return self.least or self.bytes is not None

    @classmethod
    def of(cls, options: Options, world: int) -> Wish:
        """From the options `memory`, `host_memory` and `optimizer`. "auto" is what the accelerator has, less a margin.

        world: ranks in all, of which a node has so many at most.
        """
        asked, accelerator = options.memory, ACCELERATORS[options.accelerator]
        bytes_on_node = host_bytes_of_option(options.host_memory)
        ranks = max(1, min(RANKS_PER_NODE, world))
        host = accelerator.usable_host_memory if bytes_on_node is None else bytes_on_node
        wish = cls(None, asked == "min", options.states, host // ranks, ranks)
        if asked == "auto":
            return replace(wish, bytes=accelerator.usable_memory)
        return wish if asked in ("speed", "min") else replace(wish, bytes=bytes_of_option(asked))


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen. trades: empty where nothing is made again. again: calls of the forward that the backward runs.

    away: what waits in the memory of the host, of which a rank may take `host_limit` bytes, and `ranks` share it.
    tiles: over which wide parts run. stages: in which heads run. is_cheap: it costs little of a step, if anything.
    state_bytes: of inputs and of the optimizer. as_it_was: `total` without trades, and its most in the forward and in
    both ends of the backward. limit: of `total`.
    """

    saved: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...]
    trades: tuple[Trade, ...]
    blocks: Blocks | None
    peak: Peak
    state_bytes: int
    as_it_was: int
    ends_as_it_was: tuple[int, int, int]
    limit: int | None
    away: Away | None = None
    host_limit: int = 0
    ranks: int = 1
    tiles: Tiles | None = None
    stages: HeadStages | None = None
    is_cheap: bool = True

    @property
    def total(self) -> int:
        """Bytes of everything on one rank when most is alive."""
        return self.state_bytes + self.peak.bytes

    @property
    def seconds(self) -> float:
        """That the trades cost a step, tiles, stages, and waiting for the host."""
        others = sum(lever.seconds for lever in (self.away, self.tiles, self.stages) if lever is not None)
        return sum(trade.seconds for trade in self.trades) + others

    @property
    def changes_anything(self) -> bool:
        """Whether any lever is used."""
        return bool(self.trades) or any(lever is not None for lever in (self.away, self.tiles, self.stages))

    @property
    def host_bytes(self) -> int:
        """Of this rank in the memory of its host."""
        return self.away.bytes if self.away is not None else 0

    @property
    def host_fits(self) -> bool:
        """Whether the host holds what its ranks keep there."""
        return self.host_bytes <= self.host_limit

    @property
    def fits(self) -> bool:
        """Whether everything on the rank stays below the limit."""
        return self.limit is None or self.total <= self.limit


def plan_memory(
    joint: Joint, saved: Collection[fx.Node], cost: CostModel, wish: Wish, tiles: int | None = None
) -> MemoryPlan:
    """saved: what the partitioner would save. tiles: into how many rows are cut, 1 for none; None: as it is best."""
    state = state_bytes(joint, wish.optimizer)
    levels = levels_of(joint, saved)
    peak, ends = highest(levels), most_by_part({phase: found for phase, (_, found) in levels.items()})
    as_it_was = state + peak.bytes
    if not wish.least and (wish.bytes is None or as_it_was <= ROOM * wish.bytes):
        return MemoryPlan(tuple(saved), (), (), None, peak, state, as_it_was, ends, wish.bytes)
    cost = cost.of_one_graph()
    blocks, trades = all_trades(joint, saved, cost)
    search = PlanSearch(joint, tuple(saved), trades, blocks, cost)
    limit = int(ROOM * wish.bytes) - state if wish.bytes is not None else None
    chosen = best_of_all(search, limit, wish.host, tiles)
    kept = chosen.saved
    again = made_again(joint, set(kept))
    return MemoryPlan(
        kept,
        tuple(again),
        tuple(trades[: chosen.count]),
        blocks,
        chosen.peak,
        state,
        as_it_was,
        ends,
        wish.bytes,
        chosen.away,
        wish.host,
        wish.ranks,
        chosen.tiles,
        is_cheap=search.is_cheap(chosen),
    )


def cheaper_plan(whole: MemoryPlan, staged: MemoryPlan, least: bool) -> MemoryPlan:
    """Of two plans that which fits, then that which costs less; with `least` that which takes less comes first."""

    def rank(plan: MemoryPlan) -> tuple[float, ...]:
        beyond = max(0, plan.total - int(ROOM * plan.limit)) if plan.limit is not None else 0
        return plan.total if least else beyond, max(0, plan.host_bytes - plan.host_limit), plan.seconds

    return min(whole, staged, key=rank)


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
