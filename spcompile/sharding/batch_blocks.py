"""Entries of the batch that stand in blocks: chosen answers in front, rejected ones behind them.

    cat([x, y], 0)       stack([x, y], 0), flattened
    z[:B], z.chunk(2)    parts of the dim of blocks that z is unflattened to

Written so, the batch is one factor of a dim, of which each rank has its entries of every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import argument, call, is_tensor, operand, replace, shape_of
from spcompile.graph.reshard import Place
from spcompile.sharding.index_spaces import IndexSpaces, find_index_spaces
from spcompile.sharding.rules.calls import overloads
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.spaces import Space, leaves

aten = torch.ops.aten
_CATS = frozenset(overloads("cat concat concatenate"))
_SPLITS = frozenset(
    overloads("chunk split.Tensor split.sizes split_with_sizes tensor_split.sections tensor_split.indices")
)


def write_blocks(graph: fx.Graph, inputs: Mapping[fx.Node, Place]) -> int:
    """Rewrite joins of equally many entries of `inputs`, which have them at these places, and cuts between such blocks.

    Returns how many. Entries whose number is a symbol stay as they are.
    """
    if not any(node.target in _CATS for node in graph.nodes):
        return 0
    spaces = find_index_spaces(graph)
    entries = _entries(spaces, inputs)
    joins = [node for node in graph.nodes if node.target in _CATS and _joins_entries(node, spaces, entries)]
    if not joins:
        return 0
    for node in joins:
        _join(node)
    count, is_new = len(joins), True
    for node in list(graph.nodes):
        if is_new:
            spaces = find_index_spaces(graph)
            entries, is_new = _entries(spaces, inputs), False
        found = _between_blocks(node, spaces, entries)
        if found is not None and _cut(node, *found):
            count, is_new = count + 1, True
    return count


def _entries(spaces: IndexSpaces, inputs: Mapping[fx.Node, Place]) -> set[Space]:
    return {leaf for n, place in inputs.items() for leaf in leaves(spaces.values[n][0][place.dim])}


def _dim(node: fx.Node, place: int) -> int:
    value = node.meta["val"] if is_tensor(node) else operand(node, 0).meta["val"]
    return int(argument(node, place, "dim", 0)) % max(value.ndim, 1)


def _joins_entries(node: fx.Node, spaces: IndexSpaces, entries: set[Space]) -> bool:
    parts: Any = node.args[0]
    dim = _dim(node, 1)
    if len(parts) < 2 or any(len(shape_of(part)) != len(shape_of(node)) for part in parts):
        return False
    found = [leaves(spaces.values[part][0][dim]) for part in parts]
    sizes = {shape_of(part)[dim] for part in parts}
    return (
        len(sizes) == 1
        and all(isinstance(size, int) for size in sizes)
        and all(len(f) == 1 and f[0] in entries for f in found)
    )


def _join(node: fx.Node) -> fx.Node:
    dim = _dim(node, 1)
    stacked = call(node.graph, aten.stack.default, (node.args[0], dim), like=node)
    flat = call(node.graph, aten.flatten.using_ints, (stacked, dim, dim + 1), like=node)
    replace(node, flat)
    return flat


def _between_blocks(node: fx.Node, spaces: IndexSpaces, entries: set[Space]) -> tuple[int, int] | None:
    """The dim that this call cuts, if it has blocks of entries, and how many entries a block has."""
    dim = _cut_dim(node)
    if dim is None:
        return None
    found = leaves(spaces.values[operand(node, 0)][0][dim])
    is_of_blocks = len(found) > 1 and found[-1] in entries and isinstance(found[-1].size, int)
    return (dim, found[-1].size) if is_of_blocks else None


def _cut_dim(node: fx.Node) -> int | None:
    if node.target is aten.slice.Tensor:
        return _dim(node, 1)
    return _dim(node, 2) if node.target in _SPLITS else None


def _cut(node: fx.Node, dim: int, size: int) -> int:
    """Cut a dim of blocks instead of one of blocks of `size` entries; returns 1, or 0 if the borders are others."""
    source = operand(node, 0)
    length, lengths = shape_of(source)[dim], [value.shape[dim] for value in tensor_results(node)]
    starts = [_start(node, length)] if is_tensor(node) else [0, *accumulate(lengths)][:-1]
    if argument(node, 4, "step", 1) != 1 or lengths == [length] or any(x % size for x in (*starts, *lengths)):
        return 0
    blocks = call(node.graph, aten.unflatten.int, (source, dim, [length // size, size]), like=node)
    parts = []
    for start, part in zip(starts, lengths, strict=True):
        first, last = start // size, (start + part) // size
        chosen = call(node.graph, aten.slice.Tensor, (blocks, dim, first, last), like=node)
        parts.append(call(node.graph, aten.flatten.using_ints, (chosen, dim, dim + 1), like=node))
    if is_tensor(node):
        replace(node, parts[0])
        return 1
    for user in list(node.users):
        replace(user, parts[user.args[1]])  # type: ignore[index]
    node.graph.erase_node(node)
    return 1


def _start(node: fx.Node, length: int) -> int:
    start = argument(node, 2, "start")
    start = 0 if start is None else start
    return max(start + length, 0) if start < 0 else min(start, length)
