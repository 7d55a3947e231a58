"""In which operands a call is linear: applied to the terms of a sum, it gives the terms of its result.

A group of operands is linear together: either all of them are terms (or 0), or none; the other operands are fixed. A
cast is linear only where it loses no digit.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.sharding.rules.calls import arguments, overloads
from spcompile.sharding.rules.rule import tensor_operands
from spcompile.sharding.rules.views import EXPANDS, PERMUTES, RESHAPES

aten = torch.ops.aten

_EACH = frozenset(overloads("mul.Tensor multiply.Tensor matmul mm bmm einsum outer"))
_FIRST_ONLY = """
    mul.Scalar multiply.Scalar div.Tensor div.Scalar divide.Tensor divide.Scalar true_divide.Tensor neg negative sum
    sum.dim_IntList mean mean.dim cumsum index.Tensor index_select gather take_along_dim slice.Tensor select.int narrow
    repeat repeat_interleave.self_int contiguous clone
"""
_FIRST = frozenset(overloads(_FIRST_ONLY + RESHAPES + PERMUTES + EXPANDS))
_TOGETHER = frozenset(overloads("add.Tensor sub.Tensor subtract.Tensor cat stack"))
_WRITES = frozenset(overloads("index_add index_copy scatter_add scatter.src"))  # the second operand says where
_CASTS = frozenset(overloads("to.dtype _to_copy"))
_ZEROS = frozenset(overloads("zeros zeros_like new_zeros"))
_FULL = frozenset(overloads("full full_like new_full"))


def linear_groups(node: fx.Node) -> list[frozenset[int]]:
    """The groups, as places among `tensor_operands(node)`; none where nothing is known."""
    operands, op = tensor_operands(node), node.target
    if op in _EACH:
        return [frozenset({i}) for i in range(len(operands))]
    if op is aten.linear.default:
        return [frozenset({i}) for i in range(2)] if len(operands) == 2 else []
    if op in _FIRST or (op in _CASTS and _is_exact(node)):
        return [frozenset({0})]
    if op in _TOGETHER:
        every = len(operands) > 1 or op in (aten.cat.default, aten.stack.default)
        return [frozenset(range(len(operands)))] if every else []  # x + 1 is not linear
    if op in _WRITES and len(operands) == 3:
        return [frozenset({0, 2})]
    if op is aten.masked_fill.Scalar:
        return [frozenset({0})] if arguments(node)["value"] == 0 else []
    return []


def _is_exact(cast: fx.Node) -> bool:
    """From one floating dtype to one that holds all its numbers."""
    before, after = tensor_operands(cast)[0].meta["val"].dtype, cast.meta["val"].dtype
    return bool(before.is_floating_point and torch.promote_types(before, after) == after)


def is_zero(node: fx.Node) -> bool:
    """Whether every element is known to be 0."""
    if node.target in _FULL:
        return any(
            argument == 0 and not isinstance(argument, bool) for argument in node.args[1:] if _is_number(argument)
        )
    return node.target in _ZEROS


def _is_number(argument: object) -> bool:
    return isinstance(argument, (int, float))
