"""parallelize-attention: gathered keys and values become a ring, a Ulysses exchange, or one inside the other.

Before: attention(q local, all_gather(k), all_gather(v), positions). After, on the same values,
    ring      ring_attention(q, k, v): keys and values travel, one op with the loop inside (Liu et al. 2023)
    ulysses   all_to_all(q, k, v in one message) -> attention over the whole sequence for a part of the heads
              -> all_to_all back (Jacobs et al. 2023), made again in the backward, since saving its result beside its
              operand would be saving it twice
    hybrid    the same all-to-alls among neighbours, and ring_attention between groups of them (Fang and Zhao 2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.gathered import before_gathers, exchange_heads, is_gathered, strategy_of
from spcompile.graph import call, operand
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sizes import hint

spx = torch.ops.spx


@dataclass(frozen=True)
class ParallelizeAttention(Pass):
    """Rewrite every attention whose keys and values are gathered over one axis."""

    name: ClassVar[str] = "parallelize-attention"
    stage: ClassVar[Stage] = Stage.LOCAL
    after: ClassVar[frozenset[str]] = frozenset({"lower"})
    summary: ClassVar[str] = "turns gathered keys and values into ring, Ulysses or hybrid attention"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite; returns the number of attentions."""
        count = 0
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
                exchange_heads(node, strategy.inner)
            count += 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
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


def _attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 4, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))


EXAMPLE = Example(_attention, _inputs, options={"attention": "ring"})
