"""parallelize-attention: gathered keys and values become a ring, a Ulysses exchange, or one inside the other.

Before: attention(q local, all_gather(k), all_gather(v), positions). After, on the same values,
    ring      ring_attention(q, k, v): keys and values travel, one op with the loop inside (Liu et al. 2023)
    ulysses   all_to_all(q, k, v in one message) -> attention over the whole sequence for a part of the heads
              -> all_to_all back (Jacobs et al. 2023), made again in the backward, since saving its result beside its
              operand would be saving it twice
    hybrid    the same all-to-alls among neighbours, and ring_attention between groups of them (Fang and Zhao 2024)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.head_parallel import head_parallel_attention
from spcompile.attention.op import DEFAULTS
from spcompile.attention.strategy import Strategy
from spcompile.graph import call, operand
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sizes import hint
from spcompile.splice import splice

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
        traced: dict[Any, fx.Graph] = {}
        for node in list(gm.graph.nodes):
            if node.target is not spx.attention.default or node.args[3] is None:
                continue
            if not _is_gathered(node):
                _remark_kept(node, ctx)
                continue
            degree = operand(node, 1).args[4]
            assert isinstance(degree, int)
            strategy = Strategy.parse(node.meta.get("custom", {}).get("spx_attention", "ring"), degree)
            if strategy.inner == 1:
                _ring(node)
            else:
                _head_parallel(node, strategy.inner, traced)
            count += 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return count


def _is_gathered(node: fx.Node) -> bool:
    k, v, positions = node.args[1], node.args[2], node.args[3]
    return (
        all(isinstance(x, fx.Node) and x.target is spx.all_gather.default and x.args[1] == 2 for x in (k, v))
        and isinstance(positions, fx.Node)
        and positions.target is spx.positions.default
    )


def _remark_kept(node: fx.Node, ctx: Context) -> None:
    """The rows of an image are split by its first dim, a beginning by the layout of the whole: no ring's layout."""
    k: Any = node.args[1]
    if hint(k.meta["val"].shape[2]) > 1:
        why = "its rows are a product of dims, or the beginning of a longer one"
        ctx.remarks.add("SPR202", f"keys and values of an attention are gathered: {why}", node)


def _before_gathers(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[Any, ...]]:
    """The local keys and values behind the gathers, and (query length, key length, axis, degree, order)."""
    gather = operand(node, 1)
    _, _, k_length, axis, degree, order, _ = gather.args
    q_length = operand(node, 3).args[0]
    return operand(gather, 0), operand(operand(node, 2), 0), (q_length, k_length, axis, degree, order)


def _ring(node: fx.Node) -> None:
    q, _, _, _, _, q_documents, k_documents, key_valid, bias, mask, scale, *more = node.args
    k, v, layout = _before_gathers(node)
    args = (q, k, v, q_documents, k_documents, key_valid, bias, mask, scale)
    new = call(node.graph, spx.ring_attention.default, (*args, *layout, *more), like=node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _head_parallel(node: fx.Node, inner: int, traced: dict[Any, fx.Graph]) -> None:
    q, _, _, _, _, *data = node.args
    k, v, layout = _before_gathers(node)
    data += DEFAULTS[len(data) - _REQUIRED :]
    has_rows = bool(node.meta.get("custom", {}).get("spx_bias_rows", False))
    results = splice(head_parallel_attention, (q, k, v, *data, *layout, inner, has_rows), like=node, traced=traced)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


_REQUIRED = 6  # arguments of spx.attention between the positions and the optional ones


def _attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 4, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))


EXAMPLE = Example(_attention, _inputs, options={"attention": "ring"})
