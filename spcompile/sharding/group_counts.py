"""Calls that count how many rows each group has, from the numbers of the groups that rows are in.

    histc(ids, bins=E, min=0, max=E)      one_hot(ids, E).sum((0, 1))      (ids.unsqueeze(-1) == arange(E)).sum(0)
    bincount(ids, minlength=E)            zeros(E).scatter_add(0, ids, ones)
    zeros(N, E).scatter(1, ids, 1).sum(0)      where no number stands twice in a row of ids

Which numbers those are is told through casts, moves and sorts: the same numbers have the same counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import PERMUTES, RESHAPES, overloads
from spcompile.graph.edit import is_getitem, operand, result_number, shape_of
from spcompile.graph.sizes import same
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.reductions import reduced_dims

aten = torch.ops.aten
CASTS = overloads("_to_copy to.dtype to.device to.dtype_layout contiguous clone detach alias lift_fresh_copy")
SORTS = overloads("sort sort.stable argsort argsort.stable")
SORTS_OF_TWO = frozenset(overloads("sort sort.stable"))
_ADDED = frozenset(overloads("scatter_add index_add"))
_FULL = frozenset(overloads("full full_like new_full"))
_PLACES_OF_ONE = frozenset(overloads("argmax argmin"))
_PLACES_BESIDE_VALUES = frozenset(overloads("topk max.dim min.dim"))
_WIDE = (torch.int32, torch.int64, torch.float32, torch.float64)
_SAME_NUMBERS = frozenset((*CASTS, *overloads(RESHAPES + PERMUTES)))


def is_one_of_each(counts: fx.Node, groups: int) -> bool:
    """Whether a value has one element for each group; of a `bincount` that is known where no number is greater."""
    shape = shape_of(counts)
    _, made = casts_to(counts)
    return len(shape) == 1 and (same(shape[0], groups) or made.target is aten.bincount.default)


def casts_to(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The casts that lead to a value, the last first, and what they cast."""
    calls = []
    while node.target in CASTS:
        calls.append(node)
        node = operand(node, 0)
    return calls, node


def numbers_of(ids: fx.Node) -> fx.Node:
    """The value that has the same numbers as this one, some number of times moved, cast or sorted."""
    while _has_same_numbers(ids):
        ids = operand(ids, 0)
    return ids


def _has_same_numbers(ids: fx.Node) -> bool:
    """Whether a value has the numbers of its first operand."""
    if is_getitem(ids):
        return operand(ids, 0).target in SORTS_OF_TWO and result_number(ids) == 0
    return ids.target in SORTS_OF_TWO or (ids.target in _SAME_NUMBERS and ids.meta["val"].dtype in _WIDE)


def counted_rows(node: fx.Node, groups: int) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The numbers whose 0, 1, ..., groups - 1 a call counts, and the dims that it sums over."""
    if node.target is aten.histc.default:
        args = arguments(node)
        fits = args["bins"] == groups and args["min"] == 0 and args["max"] in (groups - 1, groups)
        return (operand(node, 0), tuple(range(args["self"].ndim))) if fits and groups > 1 else None
    if node.target is aten.bincount.default:
        args = arguments(node)
        return (operand(node, 0), (0,)) if args["weights"] is None and args["minlength"] == groups else None
    if node.target in overloads("sum sum.dim_IntList") and not arguments(node).get("keepdim"):
        over, read = reduced_dims(node), operand(node, 0)
        found = [ids for ids in _one_hot(read, groups) if over == list(range(len(shape_of(read)) - 1))]
        return (found[0], tuple(over)) if found else None
    if node.target in _ADDED and is_one_of_each(node, groups) and not node.kwargs:
        zeros, _, ids, ones = node.args
        if isinstance(ids, fx.Node) and _is_every(zeros, 0) and _is_every(ones, 1) and len(shape_of(ids)) == 1:
            return ids, (0,)
    return None


def _one_hot(node: fx.Node, groups: int) -> Iterator[fx.Node]:
    """The numbers of which a value [..., groups] says which group each is."""
    while node.target in CASTS:
        node = operand(node, 0)
    if node.target is aten.one_hot.default and same(shape_of(node)[-1], groups):
        yield operand(node, 0)
    if node.target is aten.eq.Tensor:
        for ids, numbers in (node.args, node.args[::-1]):
            if not (isinstance(ids, fx.Node) and isinstance(numbers, fx.Node)):
                continue
            is_range = numbers.target is aten.arange.default and numbers.args == (groups,)
            last_is_new = ids.target is aten.unsqueeze.default and ids.args[1] in (-1, len(shape_of(ids)) - 1)
            if is_range and last_is_new:
                yield operand(ids, 0)
    if node.target is aten.scatter.value and same(shape_of(node)[-1], groups):
        zeros, dim, index, value = node.args
        is_last = dim in (-1, len(shape_of(node)) - 1)
        if is_last and value == 1 and _is_every(zeros, 0) and isinstance(index, fx.Node) and _are_distinct(index):
            yield index


def _is_every(node: Any, number: int) -> bool:
    """Whether each element of a value is this number."""
    _, at = casts_to(node)
    made = {0: "zeros zeros_like new_zeros", 1: "ones ones_like new_ones"}[number]
    return at.target in overloads(made) or (at.target in _FULL and bool(at.args[-1] == number))


def _are_distinct(ids: fx.Node) -> bool:
    """Whether no number stands twice in the last dim."""
    _, at = casts_to(ids)
    found = _looked_along(at)
    return found is not None and found[1] == len(shape_of(ids)) - 1


def are_below(ids: fx.Node, groups: int) -> bool:
    """Whether all numbers are places along a dim that has one for each group."""
    found = _looked_along(ids)
    return found is not None and same(shape_of(found[0])[found[1]], groups)


def _looked_along(places: fx.Node) -> tuple[fx.Node, int] | None:
    """In what, and along which dim, places of the largest elements were looked for; None if they are other numbers."""
    call = operand(places, 0) if is_getitem(places) and places.args[1] == 1 else places
    if call.target not in (_PLACES_OF_ONE if call is places else _PLACES_BESIDE_VALUES):
        return None
    read, dim = operand(call, 0), arguments(call)["dim"]
    return None if dim is None else (read, dim % len(shape_of(read)))
