"""An attention as lowering leaves it: local queries, gathered keys and values; and Ulysses in its place."""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx

import spcompile.attention.op  # noqa: F401  (defines the ops)
from spcompile.attention.ring.ring_call import RingCall
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.strategy import Strategy
from spcompile.attention.ulysses.head_parallel import head_parallel_attention
from spcompile.attention.ulysses.messages import Messages
from spcompile.collectives.typed_calls import AllGatherCall, PositionsCall
from spcompile.graph.splice import splice


def is_gathered(node: fx.Node) -> bool:
    """Whether a node is an attention of local rows over all keys and values, gathered along their rows."""
    if not AttentionCall.is_call(node):
        return False
    call = AttentionCall.of(node)
    gathers = [AllGatherCall.of(x) for x in (call.k, call.v) if AllGatherCall.is_call(x)]
    return [gather.dim for gather in gathers] == [2, 2] and PositionsCall.is_call(call.q_positions)


def strategy_of(node: fx.Node) -> Strategy:
    """What choose-attention wrote on a gathered attention; a ring without its word."""
    return Strategy.parse(node.meta.get("custom", {}).get("spx_attention", "ring"), before_gathers(node).degree)


def before_gathers(node: fx.Node) -> RingCall:
    """A gathered attention as a ring of the parts: of the local keys and values behind the gathers."""
    call = AttentionCall.of(node)
    k, v, rows = AllGatherCall.of(call.k), AllGatherCall.of(call.v), PositionsCall.of(call.q_positions)
    layout = {"axis": k.axis, "degree": k.degree, "order": k.order}
    return call.into(RingCall, k=k.x, v=v.x, q_length=rows.length, k_length=k.length, **layout)


def to_head_parallel(
    node: fx.Node, inner: int, messages: Messages | None = None, traced: dict[Any, fx.Graph] | None = None
) -> None:
    """Put head-parallel attention over `inner` neighbours in place of a gathered attention.

    messages: as in `head_parallel_attention`. traced: as in `splice`.
    """
    has_rows = bool(node.meta.get("custom", {}).get("spx_bias_rows", False))
    args = (inner, has_rows, messages, *before_gathers(node).named().values())
    results = splice(_head_parallel, args, like=node, traced=traced)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _head_parallel(inner: int, has_rows: bool, messages: Messages | None, *values: Any) -> Any:
    return head_parallel_attention(RingCall.bind(*values), inner, has_rows, messages)
