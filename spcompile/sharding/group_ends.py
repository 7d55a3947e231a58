"""Where groups of sorted rows end: running totals of how many rows each group has, as grouped products want them.

    ids.sort() -> x[places] -> grouped_mm(x, w, cumsum(counts of ids))
                               x.split(counts of ids, as numbers)

Of rows that a rank sorts for itself the ends must be those of the rank's own groups. They are if the counts are of the
very numbers that the rows were sorted by, in whatever order. What else reads the same counts, as a loss of balance,
means those of all rows: it has a count of its own (`count_apart`).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads
from spcompile.graph.edit import argument, is_getitem, is_tensor, operand, result_number, shape_of
from spcompile.sharding.group_counts import SORTS_OF_TWO, casts_to, counted_rows, is_one_of_each, numbers_of
from spcompile.sharding.rules.calls import arguments

aten = torch.ops.aten
GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
SPLITS = frozenset(overloads("split_with_sizes split.sizes"))
_NUMBERS = (aten.item.default, aten._local_scalar_dense.default)


@dataclass(frozen=True)
class GroupEnds:
    """The ends of groups of rows that are sorted by `key`.

    calls: what makes them; the first one counts, over the dims `over` of what it reads.
    numbers: what of them is read as Python numbers, and how; the last half are those numbers, in the order of groups.
    """

    key: fx.Node
    calls: tuple[fx.Node, ...]
    over: tuple[int, ...]
    numbers: tuple[fx.Node, ...] = ()


def is_grouped(node: fx.Node) -> bool:
    """Whether a call multiplies groups of rows, each by its own matrix."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in GROUPED


def all_ends(graph: fx.Graph) -> list[GroupEnds]:
    """What grouped products take for the ends of their groups, and splits for their sizes, where they are that."""
    products = [ends_of(node) for node in graph.nodes if is_grouped(node)]
    splits = [ends_of_pieces(node) for node in graph.nodes if node.target in SPLITS]
    return [ends for ends in products + splits if ends is not None]


def ends_of(grouped: fx.Node) -> GroupEnds | None:
    """What a grouped product takes for the ends of its groups, if it is that; None if it may be anything else."""
    offsets = argument(grouped, 2, "offs")
    if not is_tensor(offsets) or len(shape_of(offsets)) != 1:
        return None
    calls, at = casts_to(offsets)
    if at.target is not aten.cumsum.default or arguments(at)["dim"] % 1:
        return None
    return _counts(operand(at, 0), shape_of(offsets)[0], [*calls, at])


def ends_of_pieces(split: fx.Node) -> GroupEnds | None:
    """What a split takes for its sizes, if those are of all groups in order; None if they may be anything else."""
    sizes = argument(split, 1, "split_sizes")
    taken = [operand(size, 0) for size in sizes if isinstance(size, fx.Node) and size.target in _NUMBERS]
    if len(taken) < len(sizes) or not all(_is_element(at, number) for number, at in enumerate(taken)):
        return None
    counts = operand(taken[0], 0)
    if any(operand(at, 0) is not counts for at in taken) or not is_one_of_each(counts, len(sizes)):
        return None
    found = _counts(counts, len(sizes), [])
    return found and replace(found, numbers=(*taken, *sizes))


def _is_element(node: fx.Node, number: int) -> bool:
    """Whether a call takes this element out of a value."""
    return node.target is aten.select.int and node.args[1:] == (0, number)


def _counts(node: fx.Node, groups: int, behind: list[fx.Node]) -> GroupEnds | None:
    """The counts of the rows of all groups, if a value is that. behind: what makes ends of them, the last first."""
    calls, at = casts_to(node)
    found = counted_rows(at, groups)
    if found is None:
        return None
    ids, over = found
    if numbers_of(ids).meta["val"].dtype not in (torch.int32, torch.int64):
        return None  # numbers that a cast may change
    return GroupEnds(numbers_of(ids), tuple(reversed([*behind, *calls, at])), over)


def count_apart(graph: fx.Graph) -> int:
    """Give what reads the counts of groups, and is no grouped product, counts of its own; returns how many there were.

    These are of the unsorted numbers, of which the padding stands at the end.
    """
    found = all_ends(graph)
    by_last = {ends.calls[-1]: ends.calls for ends in found}
    numbers = {number for ends in found for number in ends.numbers}
    return sum(_count_again(calls, numbers) for calls in by_last.values())


def _count_again(calls: tuple[fx.Node, ...], numbers: Container[fx.Node]) -> bool:
    others = {node: _other_readers(node, calls, numbers) for node in calls}
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


def _other_readers(node: fx.Node, calls: tuple[fx.Node, ...], numbers: Container[fx.Node]) -> list[fx.Node]:
    """What reads a value on the way to the ends, but is neither on that way nor a product or a size of these groups."""

    def reads_ends(user: fx.Node) -> bool:
        return user in calls or (node is calls[-1] and (is_grouped(user) or user in numbers))

    return [user for user in node.users if not reads_ends(user)]


def _from_sorted(count: fx.Node) -> list[fx.Node]:
    """The sorted numbers that a call counts, and what stands between; nothing if it counts others."""
    path: list[fx.Node] = []
    at = count
    while at.op == "call_function" and at.all_input_nodes:
        at = at.all_input_nodes[0]
        path.append(at)
        if is_getitem(at) and operand(at, 0).target in SORTS_OF_TWO and result_number(at) == 0:
            return path[::-1]
    return []


def _copy(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    with node.graph.inserting_after(node):
        copies[node] = node.graph.node_copy(node, lambda x: copies.get(x, x))
