"""parallelize-attention: gathered keys and values become a ring, a Ulysses exchange, or one inside the other.

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
from spcompile.attention.gathered import before_gathers, exchange_heads, is_gathered, strategy_of
from spcompile.attention.op import DEFAULTS
from spcompile.attention.scores.mask import AttentionMask
from spcompile.diagnostics import IllegalOption
from spcompile.graph.edit import argument, call, operand
from spcompile.graph.sizes import hint
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.schedule.cost import cost_model

spx = torch.ops.spx

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
            if node.target is not spx.attention.default or node.args[3] is None:
                continue
            for place in (1, 2):
                _gather_last(node, place)
            if not is_gathered(node):
                _remark_kept(node, ctx)
                continue
            strategy = strategy_of(node)
            if strategy.inner == 1:
                _ring(node)
            else:
                exchange_heads(node, strategy.inner, traced=traced)
            count += 1
        if self.skip_hops != "never":
            _ask_for_hops(gm.graph, self.skip_hops == "always", ctx)
        gm.graph.eliminate_dead_code()
        return count


def _gather_last(node: fx.Node, place: int) -> None:
    """vary(all_gather(k)) = all_gather(vary(k)), where they are of two axes: key heads that all ranks of tp share."""
    varies = []
    value = operand(node, place)
    while value.target is spx.vary.default:
        varies.append(value)
        value = operand(value, 0)
    axes = [vary.args[1] for vary in varies]
    if not varies or value.target is not spx.all_gather.default or value.args[3] in axes:
        return
    local = operand(value, 0)
    for vary in reversed(varies):
        local = call(node.graph, spx.vary.default, (local, *vary.args[1:]), like=vary, before=node)
    node.update_arg(place, call(node.graph, spx.all_gather.default, (local, *value.args[1:]), like=value, before=node))


def _remark_kept(node: fx.Node, ctx: Context) -> None:
    """The rows of an image are split by its first dim, a beginning by the layout of the whole: no ring's layout."""
    k: Any = node.args[1]
    if hint(k.meta["val"].shape[2]) > 1:
        why = "its rows are a product of dims, or the beginning of a longer one"
        ctx.remarks.add("SPR202", f"keys and values of an attention are gathered: {why}", node)


def _ring(node: fx.Node) -> None:
    q, _, _, _, _, q_documents, k_documents, key_valid, bias, mask, scale, *more = node.args
    k, v, layout = before_gathers(node)
    args = (q, k, v, q_documents, k_documents, key_valid, bias, mask, scale)
    new = call(node.graph, spx.ring_attention.default, (*args, *layout, *more), like=node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _ask_for_hops(graph: fx.Graph, always: bool, ctx: Context) -> None:
    """Give every ring with documents the hops that they leave: one spx.ring_hops for all rings of one mask."""
    alike: defaultdict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    for ring in graph.find_nodes(op="call_function", target=spx.ring_attention.default):
        axis, q_documents, k_documents, mask, degree, order = (ring.args[i] for i in (11, 3, 4, 7, 12, 13))
        inner, hops = argument(ring, _INNER, "inner", 1), argument(ring, _INNER + 1, "hops")
        if hops is None and AttentionMask.parse(str(mask)).documents:
            alike[axis, q_documents, k_documents, mask, degree, order, inner].append(ring)
    for (axis, *key, inner), rings in alike.items():
        if always or _is_worth_asking(rings, ctx):
            asked = call(graph, spx.ring_hops.default, (*key, inner), like=rings[0])
            agreed = call(graph, spx.agree_on_hops.default, (asked, axis), like=rings[0])
            for mark in ("recompute", "ac_graph_id"):  # one answer for forward and backward, of all layers
                asked.meta.pop(mark, None)
                agreed.meta.pop(mark, None)
            for ring in rings:
                missing = DEFAULTS[len(ring.args) - _MORE :] if len(ring.args) < _INNER else ()
                ring.args = (*ring.args[:_INNER], *missing, inner, agreed)


def _is_worth_asking(rings: list[fx.Node], ctx: Context) -> bool:
    """Whether the hops of these rings, which documents may leave empty, take much longer than waiting for the device.

    On a CPU the documents are at hand.
    """
    if operand(rings[0], 3).meta["val"].device.type == "cpu":
        return True
    cost = cost_model(ctx.mesh, ctx.options)
    return sum(map(cost.communication, rings)) > WORTH * cost.accelerator.seconds_per_sync


_MORE, _INNER = 14, 19  # places of the optional arguments, and of `inner` and `hops`, in spx.ring_attention


def _attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 4, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))


EXAMPLE = Example(_attention, _inputs, options={"attention": "ring"})
