"""Where groups of sorted rows end: running totals of how many rows each group has, as grouped products want them.

    ids.sort() -> x[places] -> grouped_mm(x, w, cumsum(counts of ids))

Of rows that a rank sorts for itself the ends must be those of the rank's own groups. They are if the counts are of the
very numbers that the rows were sorted by, in whatever order. What else reads the same counts, as a loss of balance,
means those of all rows: it has a count of its own (`count_apart`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import PERMUTES, RESHAPES, overloads
from spcompile.graph.edit import argument, is_getitem, is_tensor, operand, result_number, shape_of
from spcompile.graph.sizes import same
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.reductions import reduced_dims

aten = torch.ops.aten
CASTS = overloads("_to_copy to.dtype to.device to.dtype_layout contiguous clone detach alias lift_fresh_copy")
SORTS = overloads("sort sort.stable argsort argsort.stable")
GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
_SORTS_OF_TWO = frozenset(overloads("sort sort.stable"))
_WIDE = (torch.int32, torch.int64, torch.float32, torch.float64)
_SAME_NUMBERS = frozenset((*CASTS, *overloads(RESHAPES + PERMUTES)))


@dataclass(frozen=True)
class GroupEnds:
    """The ends of groups of rows that are sorted by `key`.

    calls: what makes them; the first one counts, over the dims `over` of what it reads.
    """

    key: fx.Node
    calls: tuple[fx.Node, ...]
    over: tuple[int, ...]


def is_grouped(node: fx.Node) -> bool:
    """Whether a call multiplies groups of rows, each by its own matrix."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in GROUPED


def ends_of(grouped: fx.Node) -> GroupEnds | None:
    """What a grouped product takes for the ends of its groups, if it is that; None if it may be anything else."""
    offsets = argument(grouped, 2, "offs")
    if not is_tensor(offsets) or len(shape_of(offsets)) != 1:
        return None
    groups, calls = shape_of(offsets)[0], []
    at = offsets
    while at.target in CASTS:
        calls.append(at)
        at = operand(at, 0)
    if at.target is not aten.cumsum.default or arguments(at)["dim"] % 1:
        return None
    calls.append(at)
    at = operand(at, 0)
    while at.target in CASTS:
        calls.append(at)
        at = operand(at, 0)
    counted = _counted(at, groups)
    if counted is None:
        return None
    ids, over = counted
    if numbers_of(ids).meta["val"].dtype not in (torch.int32, torch.int64):
        return None  # numbers that a cast may change
    return GroupEnds(numbers_of(ids), tuple(reversed([*calls, at])), over)


def count_apart(graph: fx.Graph) -> int:
    """Give what reads the counts of groups, and is no grouped product, counts of its own; returns how many there were.

    These are of the unsorted numbers, of which the padding stands at the end.
    """
    found = [ends_of(node) for node in graph.nodes if is_grouped(node)]
    by_last = {ends.calls[-1]: ends.calls for ends in found if ends is not None}
    return sum(_count_again(calls) for calls in by_last.values())


def _count_again(calls: tuple[fx.Node, ...]) -> bool:
    others = {node: _other_readers(node, calls) for node in calls}
    read = [place for place, node in enumerate(calls) if others[node]]
    if not read:
        return False
    copies: dict[fx.Node, fx.Node] = {}
    path = _from_sorted(calls[0])
    if path:
        sorted_ids, *path = path
        copies[sorted_ids] = operand(operand(sorted_ids, 0), 0)
    for node in [*path, *calls[: read[-1] + 1]]:
        _copy(node, copies)
    for node, readers in others.items():
        for reader in readers:
            reader.replace_input_with(node, copies[node])
    return True


def _other_readers(node: fx.Node, calls: tuple[fx.Node, ...]) -> list[fx.Node]:
    """What reads a value on the way to the ends, but is neither on that way nor a product of these groups."""
    return [user for user in node.users if user not in calls and not (node is calls[-1] and is_grouped(user))]


def _from_sorted(count: fx.Node) -> list[fx.Node]:
    """The sorted numbers that a call counts, and what stands between; nothing if it counts others."""
    path: list[fx.Node] = []
    at = count
    while at.op == "call_function" and at.all_input_nodes:
        at = at.all_input_nodes[0]
        path.append(at)
        if is_getitem(at) and operand(at, 0).target in _SORTS_OF_TWO and result_number(at) == 0:
            return path[::-1]
    return []


def _copy(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    with node.graph.inserting_after(node):
        copies[node] = node.graph.node_copy(node, lambda x: copies.get(x, x))


def numbers_of(ids: fx.Node) -> fx.Node:
    """The value that has the same numbers as this one, some number of times moved, cast or sorted."""
    while _has_same_numbers(ids):
        ids = operand(ids, 0)
    return ids


def _has_same_numbers(ids: fx.Node) -> bool:
    """Whether a value has the numbers of its first operand."""
    if is_getitem(ids):
        return operand(ids, 0).target in _SORTS_OF_TWO and result_number(ids) == 0
    return ids.target in _SORTS_OF_TWO or (ids.target in _SAME_NUMBERS and ids.meta["val"].dtype in _WIDE)


def _counted(node: fx.Node, groups: int) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The numbers whose 0, 1, ..., groups - 1 a call counts, and the dims that it sums over."""
    if node.target is aten.histc.default:
        args = arguments(node)
        fits = args["bins"] == groups and args["min"] == 0 and args["max"] in (groups - 1, groups)
        return (operand(node, 0), tuple(range(args["self"].ndim))) if fits and groups > 1 else None
    if node.target in overloads("sum sum.dim_IntList") and not arguments(node).get("keepdim"):
        over = reduced_dims(node)
        found = [ids for ids in _one_hot(operand(node, 0), groups) if over == list(range(len(shape_of(ids))))]
        return (found[0], tuple(over)) if found else None
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
