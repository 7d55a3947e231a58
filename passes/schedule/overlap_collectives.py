"""overlap-collectives: communication is on its way while compute runs that does not need it.

Before   start = reduce_scatter_tensor(...)      After   start = reduce_scatter_tensor(...)
         wait = wait_tensor(start)                       mm = aten.mm(...)        # a gradient of a weight
         mm = aten.mm(...)                               wait = wait_tensor(start)

No node is added or removed: the order changes, and with it what is alive at once, under a budget. How the order is
found is in `spcompile/schedule/list_schedule.py`; what an op and a collective take is a table
(`spcompile/schedule/op_cost.py`), so that all ranks find the same order. Inductor is told to keep it
(`spcompile/program/emit.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.memory.planner import ROOM, Wish
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.list_schedule import ListScheduler
from spcompile.schedule.op_cost import cost_model
from spcompile.schedule.timeline import starts, timeline

MEBIBYTE = 2**20


@dataclass(frozen=True)
class OverlapCollectives(Pass):
    """Start collectives early, wait for them late, and fill the time between.

    memory_mib: at most this much is alive for the sake of overlap alone: parameters gathered ahead of their use,
        operands of products that were put off, gradients on their way. Nor more than the room that a plan of memory
        leaves below its limit; nothing under memory="min".
    ahead: a gather starts this many times its own predicted seconds before its use.
    """

    name: ClassVar[str] = "overlap-collectives"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    after: ClassVar[frozenset[str]] = frozenset({"lower-collectives"})
    summary: ClassVar[str] = "orders starts, waits and compute so that communication is hidden"

    memory_mib: float = 1024.0
    ahead: float = 3.0

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Sort the graph; returns how many nodes follow another node than before."""
        if not any(starts(node) for node in gm.graph.nodes):
            return 0
        cost = cost_model(ctx.mesh, ctx.options).of_one_graph()
        output = gm.graph.output_node()
        old = [node for node in gm.graph.nodes if node is not output]
        wish = Wish.of(ctx.options, ctx.mesh.world_size)
        room = 0.0 if wish.least else math.inf if wish.bytes is None else (1 - ROOM) * wish.bytes
        new = ListScheduler(gm.graph, cost, min(self.memory_mib * MEBIBYTE, room), self.ahead).run()
        moved = sum(a is not b for a, b in zip(old, new, strict=True))
        if moved and timeline("", new, cost).seconds > timeline("", old, cost).seconds:
            return 0
        for node in new:
            output.prepend(node)
        return moved


def _two_layers(x_BSD: Tensor, first_DD: Tensor, second_DD: Tensor) -> Tensor:
    q_BNSD = (x_BSD @ first_DD)[:, None]
    y_BSD = torch.nn.functional.scaled_dot_product_attention(q_BNSD, q_BNSD, q_BNSD)[:, 0]
    return y_BSD @ second_DD


def _inputs() -> tuple[Tensor, ...]:
    shapes = ((1, 7, 4), (4, 4), (4, 4))
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


EXAMPLE = Example(_two_layers, _inputs, options={"attention": "ring"})
