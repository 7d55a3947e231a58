"""The same choices as `memory=` makes, as steps that do not depend on the number of layers.

Layers alike offer the same trades. A rung of the ladder is the number of kinds of trades that are made, each in all
layers, the cheapest first. What a rung takes and costs is linear in the number of layers, so two programs of few layers
tell what it is for many. Which inputs of blocks are given up depends on their number: no rung gives up any. On the last
rung, `HOST`, all trades are made, and all that is still saved and can go waits in the memory of the host.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch.fx as fx

from spcompile.diagnostics import SourceLine, source_of
from spcompile.graph.storage import root_of
from spcompile.machine.optimizers import Optimizer
from spcompile.memory.host_plan import Clock
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Away, levels_of, most_by_part
from spcompile.memory.planner import all_trades, state_bytes
from spcompile.memory.stream_blocks import Blocks
from spcompile.memory.trades import Trade, made_again, saved_after
from spcompile.schedule.op_cost import CostModel

Kind = tuple[str, SourceLine | None]
HOST = -1


@dataclass(frozen=True)
class Ladder:
    """kinds: of trades, in the order in which they are made; rung n makes the first n.

    state_bytes: of inputs and of the optimizer.
    """

    joint: Joint
    saved: tuple[fx.Node, ...]
    trades: tuple[Trade, ...]
    blocks: Blocks
    kinds: tuple[Kind, ...]
    state_bytes: int
    cost: CostModel

    @classmethod
    def of(cls, joint: Joint, saved: Collection[fx.Node], cost: CostModel, optimizer: Optimizer) -> Ladder:
        """saved: what the partitioner would save."""
        cost = cost.of_one_graph()
        blocks, trades = all_trades(joint, saved, cost, block_inputs=False)
        kinds = tuple(dict.fromkeys(map(_kind_of_trade, trades)))
        return cls(joint, tuple(saved), tuple(trades), blocks, kinds, state_bytes(joint, optimizer), cost)

    def made(self, rung: int) -> list[Trade]:
        """The trades of a rung."""
        wanted = set(self.kinds if rung == HOST else self.kinds[:rung])
        return [trade for trade in self.trades if _kind_of_trade(trade) in wanted]

    def rung(self, number: int) -> Rung:
        """What is saved and what is made again."""
        trades = self.made(number)
        kept = saved_after(self.saved, trades)
        away = None
        if number == HOST:
            clock = Clock.of(self.joint, kept, self.cost)
            away = clock.away(clock.can_go())
        return Rung(tuple(kept), tuple(made_again(self.joint, set(kept))), tuple(trades), away)

    def peaks(self, number: int) -> tuple[int, int, int]:
        """The most that is alive on a rung, inputs aside: in the forward, and in both ends of the backward."""
        rung = self.rung(number)
        return most_by_part(
            {phase: found for phase, (_, found) in levels_of(self.joint, rung.saved, rung.away).items()}
        )


@dataclass(frozen=True)
class Rung:
    """again: calls of the forward that the backward runs. trades: empty where nothing is made again.

    away: what waits in the memory of the host.
    """

    saved: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...]
    trades: tuple[Trade, ...]
    away: Away | None = None


def _kind_of_trade(trade: Trade) -> Kind:
    root = root_of(trade.given_up[0])
    return getattr(root.target, "__name__", str(root.target)), source_of(root)
