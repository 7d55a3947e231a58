"""In which operands a call is linear: applied to the terms of a sum, it gives the terms of its result.

A group of operands is linear together: either all of them are terms (or 0), or none; the other operands are fixed. A
cast is linear only where it loses no digit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import EXPANDS, PERMUTES, RESHAPES, overloads, tensor_operands
from spcompile.graph.edit import argument, is_getitem

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
_PARTS = frozenset(
    overloads("split.Tensor split_with_sizes split.sizes chunk unbind.int flip roll tril triu detach alias")
)
_PUTS = frozenset(overloads("slice_scatter select_scatter"))
# Of one tensor each. mask_padding is, but for padding, which no value depends on.
_BETWEEN_RANKS = {
    *("spx::all_gather", "spx::all_reduce", "spx::all_to_all", "spx::mask_padding"),
    *("spx::reduce_scatter", "spx::shard", "spx::vary"),
}
_EMPTY = frozenset(overloads("empty.memory_format empty_like new_empty"))  # what is written later counts
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
        return [frozenset({0})] if argument(node, 2, "value", 0) == 0 else []
    return []


def linear_in(graph: fx.Graph, given: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that are linear in `given`, all of them taken together: sums of such terms, and 0, are.

    They are 0 where all of `given` is. A cast to another floating dtype counts as linear, also where it rounds.
    """
    found = set(given)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inside = {place for place, x in enumerate(tensor_operands(node)) if x in found}
        if is_getitem(node):
            keeps = node.args[0] in found
        else:
            keeps = is_zero(node) or node.target in _EMPTY or (bool(inside) and inside in _groups_of_gradients(node))
        if keeps:
            found.add(node)
    return found


def affine_in(graph: fx.Graph, given: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that are the sum of something linear in `given` and of something that does not depend on it."""
    moving = set(given)
    found = {*graph.find_nodes(op="placeholder"), *moving}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        read = moving.intersection(node.all_input_nodes)
        if not read:
            found.add(node)
            continue
        moving.add(node)
        inside = {place for place, x in enumerate(tensor_operands(node)) if x in moving}
        groups = [frozenset({0})] if is_getitem(node) or node.target in _TOGETHER else []  # x + 1 among them
        if read <= found and any(inside <= group for group in (*groups, *_groups_of_gradients(node))):
            found.add(node)
    return found


def _groups_of_gradients(node: fx.Node) -> list[frozenset[int]]:
    """`linear_groups`, and calls through which sums of ranks do not pass."""
    value = node.meta.get("val")
    if getattr(getattr(node.target, "_schema", None), "name", "") in _BETWEEN_RANKS:
        return [frozenset({0})]
    if node.target in _PARTS or (node.target in _CASTS and isinstance(value, Tensor) and value.is_floating_point()):
        return [frozenset({0})]
    if node.target in _PUTS:
        return [frozenset({0, 1})]
    if node.target is aten.index_put.default:
        return [frozenset({0, len(tensor_operands(node)) - 1})]
    if node.target is aten.where.self:
        return [frozenset(range(1, len(tensor_operands(node))))]
    if node.target is aten.constant_pad_nd.default:
        return [frozenset({0})] if argument(node, 2, "value", 0) == 0 else []
    return linear_groups(node)


def _is_exact(cast: fx.Node) -> bool:
    """From one floating dtype to one that holds all its numbers."""
    before, after = tensor_operands(cast)[0].meta["val"].dtype, cast.meta["val"].dtype
    return bool(before.is_floating_point and torch.promote_types(before, after) == after)


def is_zero(node: fx.Node) -> bool:
    """Whether every element is known to be 0."""
    if node.target in _FULL:
        return any(
            argument == 0 and not isinstance(argument, bool) for argument in node.args[1:] if _is_plain_number(argument)
        )
    return node.target in _ZEROS


def _is_plain_number(argument: object) -> bool:
    return isinstance(argument, (int, float))
