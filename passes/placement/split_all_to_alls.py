"""split-all-to-alls: Ulysses in several messages, where compute hides them; one message would hide behind nothing.

Before: attention(q local, all_gather(k), all_gather(v), positions), to become
             all_to_all(q, k, v in one message) -> attention -> all_to_all
After, on the same values and with as many bytes, one or both of
    apart    q, k and v each in a message of its own, so that q is on its way while k and v are projected
    groups   attention of a part of the heads at a time: while one group is computed, the next one arrives, and the
             result of the one before is on its way back; of the first group q, k and v may be apart

What pays is found by adding up, from the tables, when all results are back: the projections that stand between q, k and
v, the bytes and the latency of every message, attention, and the launches that more messages cost. Assumed: attention
of a group reaches the rate of all of them if it takes FULL launches at least; the backward hides its all-to-alls behind
the products that give gradients of weights. overlap-collectives finds the order. Attentions that keep one message, and
rings, are left to parallelize-attention. In a hybrid heads are only grouped when that is asked for.

The next projection waits for all groups. It could start with the first as a sum of products over parts of its
contracted dim. But the sum rounds once for each, and reads and writes its result once more: on NVLink that takes about
as long as it hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.lowered_attention import before_gathers, is_gathered, strategy_of, to_head_parallel
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.ulysses.head_groups import HeadGroups
from spcompile.attention.ulysses.head_parallel import keys_travel_apart
from spcompile.attention.ulysses.head_shares import HeadSplit
from spcompile.attention.ulysses.messages import WAYS, Messages, Times, candidates, together
from spcompile.diagnostics import IllegalOption
from spcompile.graph.typed_call import value_of
from spcompile.machine.durations import ms_text
from spcompile.machine.links import link_of
from spcompile.machine.mesh import inner_part
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.op_cost import CostModel, cost_model

GROUPS = (1, 2, 4)
FULL = 32  # launches of a kernel: attention that takes as long fills the device


@dataclass(frozen=True)
class SplitAllToAlls(Pass):
    """Cut the all-to-alls of Ulysses where the tables say that it pays.

    groups: of heads; None decides by time. Where so many do not divide a rank's heads, the next smaller number does.
    way: one of WAYS in spcompile/attention/ulysses/messages.py; None decides by time.
    """

    name: ClassVar[str] = "split-all-to-alls"
    stage: ClassVar[Stage] = Stage.LOCAL
    after: ClassVar[frozenset[str]] = frozenset({"lower"})
    axis: ClassVar[str | None] = "cp"
    summary: ClassVar[str] = "Ulysses in several messages, which hide behind projections and behind attention"

    groups: int | None = None
    way: str | None = None

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite; returns the number of attentions.

        Raises:
            IllegalOption: a way or a number of groups that there is not.
        """
        if self.way not in (None, *WAYS):
            raise IllegalOption(f"passes: split-all-to-alls: way={self.way!r}", legal=", ".join(WAYS))
        if self.groups is not None and self.groups < 1:
            raise IllegalOption(f"passes: split-all-to-alls: groups={self.groups}", legal="1 or more")
        cost = cost_model(ctx.mesh, ctx.options)
        count = 0
        traced: dict[Any, fx.Graph] = {}
        for node, since in list(_attentions(gm.graph)):
            inner = strategy_of(node).inner
            if inner == 1:
                continue
            ring = before_gathers(node)
            sizes = ring.sizes.hints()
            heads = HeadSplit(sizes.heads, sizes.kv_heads, inner)
            keys_apart = keys_travel_apart(heads, value_of(ring.q_length), value_of(ring.k_length))
            whole = together(heads, keys_apart=keys_apart)
            times = _times(node, heads, since, cost)
            best = self._choose(node, heads, times, keys_apart)
            if best == whole:
                continue
            old, new = (f"{ms_text(times.until_back(x))} ms" for x in (whole, best))
            back = f"{best.groups} back" if best.groups > 1 else "one back"
            text = f"Ulysses sends {best}, and {back}: from the projections to the result in {new}, instead of {old}"
            ctx.remarks.add("SPR205", text, strict_error=False)
            to_head_parallel(node, inner, best, traced)
            count += 1
        if count:
            gm.graph.eliminate_dead_code()
        return count

    def _choose(self, node: fx.Node, heads: HeadSplit, times: Times, keys_apart: bool) -> Messages:
        """The one that takes least; of equal ones that with fewest messages."""
        if self.groups is not None:
            counts = [max(n for n in range(1, self.groups + 1) if HeadGroups.divides(heads, n))]
        elif strategy_of(node).outer > 1:
            counts = [1]
        else:
            counts = [n for n in GROUPS if n == 1 or times.attention / n >= FULL * times.kernel]
        ways = WAYS if self.way is None else (self.way,)
        found = candidates(heads, counts, ways, keys_apart=keys_apart)
        return min(found, key=lambda x: (times.until_back(x), len(x.messages)))


def _attentions(graph: fx.Graph) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Attentions over gathered keys, each with the nodes between the attention before and itself."""
    since: set[fx.Node] = set()
    for node in graph.nodes:
        if is_gathered(node):
            yield node, since
        if AttentionCall.is_call(node):
            since = set()
        since.add(node)


def _times(node: fx.Node, heads: HeadSplit, since: set[fx.Node], cost: CostModel) -> Times:
    ring = before_gathers(node)
    operands = {"q": ring.q, "k": ring.k, "v": ring.v}
    ready: dict[str, float] = {}
    made: set[fx.Node] = set()
    now = 0.0
    for name, value in operands.items():
        own = _leading_to(value, since - made)
        now += sum(cost.work(n).seconds for n in own) if ready else 0.0
        made |= own
        ready[name] = now
    sizes = ring.sizes.hints()
    width = {"q": sizes.qk_size, "k": sizes.qk_size, "v": sizes.v_size, "out": sizes.v_size}
    shape = {name: heads.local_heads if name in ("q", "out") else heads.local_kv_heads for name in width}
    rows = {name: sizes.q_rows if name in ("q", "out") else sizes.k_rows for name in width}
    number = sizes.batch * (heads.degree - 1) * value_of(ring.q).element_size()
    padded = heads.local_heads * heads.degree / heads.heads
    return Times(
        ready=ready,
        sent={name: number * shape[name] * rows[name] * width[name] for name in width},
        attention=cost.work(node).compute * padded,
        kernel=cost.accelerator.seconds_per_kernel,
        link=link_of(
            cost.mesh,
            ring.axis if heads.degree == ring.degree else inner_part(ring.axis, heads.degree),
            cost.links,
            own=cost.accelerator.links,
        ),
    )


def _leading_to(value: fx.Node, among: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node in among and node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _projected(x_BSD: Tensor, q_DD: Tensor, k_DD: Tensor, v_DD: Tensor) -> Tensor:
    q, k, v = ((x_BSD @ w).reshape(1, 7, 4, 2).transpose(1, 2) for w in (q_DD, k_DD, v_DD))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    x_BSD = torch.randn(1, 7, 8, dtype=torch.float64)
    return x_BSD, *(torch.randn(8, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))


EXAMPLE = Example(_projected, _inputs, options={"attention": "ulysses"}, fields={"groups": 2, "way": "first apart"})
