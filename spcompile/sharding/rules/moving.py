"""Where an op only puts elements of a dim elsewhere, and ranks may send each other what goes over a border.

Each dim, of an operand as of a result, is laid out evenly by itself. So a concatenation of two sequences costs each
rank a message to its neighbours, and no rank ever has more than its part of either. What is short, such as a class
token, is held by all ranks: its message would be padding for the most part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.sizes import Size, hint, same
from spcompile.sharding.rules.factors import Factor, factors, make_rule
from spcompile.sharding.rules.rule import Move, OpRule, tensor_results

SHORT = 64  # a dim is short beside one that is more than so many times longer


def with_moves(node: fx.Node, rule: OpRule, dim: int, moves: Sequence[tuple[int, int, Size, Size, Size]]) -> OpRule:
    """`rule`, and what the call does along `dim` by moves: (operand, result, start, to, count).

    All other dims pass. A result without `dim` is a single element of it.
    """
    name = next(iter(node.target._schema.arguments)).name  # type: ignore[union-attr]
    operands, results = [n.meta["val"] for n in tensor_operands(node)], tensor_results(node)
    dim %= operands[0].ndim
    others = factors(operands[0].shape)
    lengths = [x.shape[dim] for x in (*operands, *results) if x.ndim == len(others)]
    longest = max(map(hint, lengths))
    ends = [x.shape[dim] for x in operands]
    any_long = any(_is_long(size, longest) for size in ends)

    def layout(x: Any, may_be_short: bool) -> list[Factor]:
        if x.ndim < len(others):
            return [*others[:dim], *others[dim + 1 :]]
        length = x.shape[dim]
        moved = Factor(length, replicated=may_be_short and not _is_long(length, longest))
        return [*others[:dim], moved, *others[dim + 1 :]]

    given = [layout(x, may_be_short=any_long) for x in operands]
    made = [layout(x, may_be_short=True) for x in results]
    moving = make_rule(
        node,
        {name: given if isinstance(node.args[0], list | tuple) else given[0]},
        made,
        moves=[Move(operand, result, dim, start, to, count) for operand, result, start, to, count in moves],
        moved=[dims[dim] for dims in (*made, *given) if len(dims) == len(others) and not dims[dim].replicated],
    )
    return replace(rule, moving=moving) if moving.moved else rule


def _is_long(size: Size, longest: int) -> bool:
    return not same(size, 1) and SHORT * hint(size) > longest
