"""parallelize-attention: gathered keys and values become a ring, an all-to-all of Ulysses, or one inside the other.

Before: attention(q local, all_gather(k), all_gather(v), positions). After, on the same values,
    ring      ring_attention(q, k, v): keys and values travel, one op with the loop inside (Liu et al. 2023)
    ulysses   all_to_all(q, k, v in one message) -> attention over the whole sequence for a part of the heads
              -> all_to_all back (Jacobs et al. 2023), made again in the backward, since saving its result beside its
              operand would be saving it twice
    hybrid    the same all-to-alls among neighbours, and ring_attention between groups of them (Fang and Zhao 2024)

Rings whose mask has documents are told when they run which hops documents leave empty: one spx.ring_hops for each mask,
shared by all layers, on whose answer ranks agree. On a GPU that waits for the device once a step, so there it is made
where all those hops together would take much longer than that, by the tables of links and accelerators.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

import spcompile.attention.ring.hops  # noqa: F401  (defines spx::ring_hops)
from spcompile.attention.lowered_attention import before_gathers, is_gathered, strategy_of, to_head_parallel
from spcompile.attention.ring.ring_call import AgreeOnHopsCall, RingCall, RingHopsCall
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.collectives.typed_calls import AllGatherCall, VaryCall
from spcompile.diagnostics import IllegalOption
from spcompile.graph.edit import replace
from spcompile.graph.typed_call import value_of
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.op_cost import cost_model

SKIP_HOPS = ("auto", "always", "never")
WORTH = 10  # a hop that might be empty is asked for where all of them take so many times the asking


@dataclass(frozen=True)
class ParallelizeAttention(Pass):
    """Rewrite every attention whose keys and values are gathered over one axis.

    skip_hops: whether rings ask which hops documents leave empty: "always", "never", or "auto", where it is worth it.
    """

    name: ClassVar[str] = "parallelize-attention"
    stage: ClassVar[Stage] = Stage.LOCAL
    after: ClassVar[frozenset[str]] = frozenset({"lower"})
    summary: ClassVar[str] = "turns gathered keys and values into ring, Ulysses or hybrid attention"

    skip_hops: str = "auto"

    def __post_init__(self) -> None:
        if self.skip_hops not in SKIP_HOPS:
            raise IllegalOption(f"skip_hops={self.skip_hops!r}", legal=", ".join(map(repr, SKIP_HOPS)))

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite; returns the number of attentions."""
        count = 0
        traced: dict[Any, fx.Graph] = {}
        for node in list(gm.graph.nodes):
            if not AttentionCall.is_call(node) or AttentionCall.of(node).q_positions is None:
                continue
            for name in ("k", "v"):
                _gather_last(node, name)
            if not is_gathered(node):
                _remark_kept(node, ctx)
                continue
            strategy = strategy_of(node)
            if strategy.inner == 1:
                replace(node, before_gathers(node).insert(like=node))
            else:
                to_head_parallel(node, strategy.inner, traced=traced)
            count += 1
        if self.skip_hops != "never":
            _ask_for_hops(gm.graph, self.skip_hops == "always", ctx)
        gm.graph.eliminate_dead_code()
        return count


def _gather_last(node: fx.Node, name: str) -> None:
    """vary(all_gather(k)) = all_gather(vary(k)), where they are of two axes: key heads that all ranks of tp share."""
    attention = AttentionCall.of(node)
    varies = []
    value = getattr(attention, name)
    while VaryCall.is_call(value):
        varies.append(value)
        value = VaryCall.of(value).x
    axes = [VaryCall.of(vary).axis for vary in varies]
    if not varies or not AllGatherCall.is_call(value) or AllGatherCall.of(value).axis in axes:
        return
    gather = AllGatherCall.of(value)
    local = gather.x
    for vary in reversed(varies):
        local = VaryCall.of(vary).but(x=local).insert(like=vary, before=node)
    gathered = gather.but(x=local).insert(like=value, before=node)
    attention.but(**{name: gathered}).write(node)


def _remark_kept(node: fx.Node, ctx: Context) -> None:
    """The rows of an image are split by its first dim, a beginning by the layout of the whole: no ring's layout."""
    if AttentionCall.of(node).sizes.hints().k_rows > 1:
        why = "its rows are a product of dims, or the beginning of a longer one"
        ctx.remarks.add("SPR202", f"keys and values of an attention are gathered: {why}", node)


def _ask_for_hops(graph: fx.Graph, always: bool, ctx: Context) -> None:
    """Give every ring with documents the hops that they leave: one spx.ring_hops for all rings of one mask."""
    alike: defaultdict[tuple[str, RingHopsCall], list[fx.Node]] = defaultdict(list)
    for node in RingCall.all_in(graph):
        ring = RingCall.of(node)
        if ring.hops is None and _may_leave_hops_empty(ring):
            alike[ring.axis, ring.into(RingHopsCall)].append(node)
    for (axis, hops), rings in alike.items():
        if always or _is_worth_asking(rings, ctx):
            asked = hops.insert(like=rings[0])
            agreed = AgreeOnHopsCall(hops=asked, axis=axis).insert(like=rings[0])
            for mark in ("recompute", "ac_graph_id"):  # one answer for forward and backward, of all layers
                asked.meta.pop(mark, None)
                agreed.meta.pop(mark, None)
            for node in rings:
                RingCall.of(node).but(hops=agreed).write(node)


def _may_leave_hops_empty(ring: RingCall) -> bool:
    """Whether documents may; those that only tell rows without keys do where usual rows do not see all ranks' keys."""
    mask = ring.attention_mask
    return mask.documents and (mask.fill is None or ring.ring.distances(mask.usual) != ring.ring.distances(mask))


def _is_worth_asking(rings: list[fx.Node], ctx: Context) -> bool:
    """Whether the hops of these rings, which documents may leave empty, take much longer than waiting for the device.

    On a CPU the documents are at hand.
    """
    if value_of(RingCall.of(rings[0]).q_documents).device.type == "cpu":
        return True
    cost = cost_model(ctx.mesh, ctx.options)
    return sum(map(cost.communication, rings)) > WORTH * cost.accelerator.seconds_per_sync


def _causal_attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 4, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))


EXAMPLE = Example(_causal_attention, _inputs, options={"attention": "ring"})
