"""Which values a compiler that fuses never writes to memory.

Inductor computes elementwise calls and reductions behind one another in one kernel. An elementwise value that only such
calls read is made inside of it, once in each kernel that reads it; what a reduction gives is written. What a kernel
reads must be there until it runs: at the calls behind whose results are written. A kernel does not read any number of
values, so that a long chain of sums is several kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.fx as fx

from spcompile.graph.storage import root_of

aten = torch.ops.aten
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.var_mean}
MOST_READ = 8  # by a value that is not written (torch 2.13: _inductor/config.py, realize_acc_reads_threshold)


def fused_away(
    nodes: Iterable[fx.Node], kept: Collection[fx.Node], root: Callable[[fx.Node], fx.Node] = root_of
) -> set[fx.Node]:
    """The calls whose values are never written.

    kept: storages that must be, as those that are saved or returned. root: finds the storage of a value.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    made = [node for node in nodes if root(node) is node]
    for node in made:
        for value in node.all_input_nodes:
            readers.setdefault(root(value), []).append(node)
    reads: dict[fx.Node, set[fx.Node]] = {}  # of what is not written: the storages that it is made from
    for node in made:
        if is_made_inside(node) and node not in kept and readers.get(node) and all(map(is_fusible, readers[node])):
            roots = (root(value) for value in node.all_input_nodes)
            found = {source for own in roots for source in reads.get(own, (own,))}
            if len(found) <= MOST_READ:
                reads[node] = found
    return set(reads)


def is_fusible(node: fx.Node) -> bool:
    """Whether a call is part of the kernels of what it reads and what reads it."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _REDUCTIONS or torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet is aten._to_copy


def is_made_inside(node: fx.Node) -> bool:
    """Whether kernels that read the value of a call may make it themselves."""
    return is_fusible(node) and getattr(node.target, "overloadpacket", None) not in _REDUCTIONS


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
