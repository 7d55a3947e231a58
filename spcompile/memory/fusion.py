"""Which values a compiler that fuses never writes to memory.

Inductor computes elementwise calls and reductions behind one another in one kernel. A value that only such calls read
is made inside of it, once in each kernel that reads it. What a kernel reads must be there until it runs: at the calls
behind whose results are written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.fx as fx

from spcompile.graph.storage import root_of

aten = torch.ops.aten
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.var_mean}


def fused_away(
    nodes: Iterable[fx.Node], kept: Collection[fx.Node], root: Callable[[fx.Node], fx.Node] = root_of
) -> set[fx.Node]:
    """The calls whose values are never written.

    kept: storages that must be, as those that are saved or returned. root: finds the storage of a value.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    made: list[fx.Node] = []
    for node in nodes:
        if root(node) is not node:
            continue
        if _is_fusible(node):
            made.append(node)
        for value in node.all_input_nodes:
            readers.setdefault(root(value), []).append(node)
    return {node for node in made if node not in kept and readers.get(node) and all(map(_is_fusible, readers[node]))}


def _is_fusible(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _REDUCTIONS or torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet is aten._to_copy


def kernel_ends(
    order: Sequence[fx.Node], inside: Collection[fx.Node], root: Callable[[fx.Node], fx.Node] = root_of
) -> list[int]:
    """For each call of an order, up to which call what it reads must be there.

    inside: calls that are fused away. root: finds the storage of a value.
    """
    place = {node: at for at, node in enumerate(order)}
    ends = list(range(len(order)))
    for at in reversed(range(len(order))):
        if order[at] in inside or root(order[at]) is not order[at]:  # a view is read where its readers are
            ends[at] = max((ends[place[user]] for user in order[at].users if place.get(user, -1) > at), default=at)
    return ends
