"""An attention as lowering leaves it: local queries, gathered keys and values; and Ulysses in its place."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from spcompile.attention.op import DEFAULTS
from spcompile.attention.strategy import Strategy
from spcompile.attention.ulysses.exchanges import Exchanges
from spcompile.attention.ulysses.head_parallel import head_parallel_attention
from spcompile.graph.edit import operand
from spcompile.graph.splice import splice

spx = torch.ops.spx
_REQUIRED = 6  # arguments of spx.attention between the positions and the optional ones


def is_gathered(node: fx.Node) -> bool:
    """Whether a node is an attention of local rows over all keys and values, gathered along their rows."""
    if node.target is not spx.attention.default:
        return False
    k, v, positions = node.args[1], node.args[2], node.args[3]
    return (
        all(isinstance(x, fx.Node) and x.target is spx.all_gather.default and x.args[1] == 2 for x in (k, v))
        and isinstance(positions, fx.Node)
        and positions.target is spx.positions.default
    )


def strategy_of(node: fx.Node) -> Strategy:
    """What choose-attention wrote on a gathered attention; a ring without its word."""
    degree = operand(node, 1).args[4]
    assert isinstance(degree, int)
    return Strategy.parse(node.meta.get("custom", {}).get("spx_attention", "ring"), degree)


def before_gathers(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[Any, ...]]:
    """The local keys and values behind the gathers, and (query length, key length, axis, degree, order)."""
    gather = operand(node, 1)
    _, _, k_length, axis, degree, order, _ = gather.args
    q_length = operand(node, 3).args[0]
    return operand(gather, 0), operand(operand(node, 2), 0), (q_length, k_length, axis, degree, order)


def exchange_heads(
    node: fx.Node, inner: int, exchanges: Exchanges | None = None, traced: dict[Any, fx.Graph] | None = None
) -> None:
    """Put head-parallel attention over `inner` neighbours in place of a gathered attention.

    exchanges: as in `head_parallel_attention`. traced: as in `splice`.
    """
    q, _, _, _, _, *data = node.args
    k, v, layout = before_gathers(node)
    data += DEFAULTS[len(data) - _REQUIRED :]
    has_rows = bool(node.meta.get("custom", {}).get("spx_bias_rows", False))
    results = splice(
        head_parallel_attention, (q, k, v, *data, *layout, inner, has_rows, exchanges), like=node, traced=traced
    )
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)
