"""One part of a dim, computed alone: a cut goes up through calls, to the product whose matrix is cut instead.

A dim of a value is seen as [outer, parts, inner]; a part is one index of the middle. So the heads of a group are seen
whose ranks lie outside of them, in a dim of all heads as in one that has the features of all heads. What each index of
a dim goes through alone is computed of the part: moves, elementwise calls, sums over other dims. Cuts end at a product
with a matrix that is made of inputs, and where parts are put together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.graph.aten_ops import packet_of
from spcompile.graph.edit import call, is_getitem, is_tensor, operand, shape_of

aten = torch.ops.aten
spx = torch.ops.spx
_VIEWS = {aten.view, aten._unsafe_view, aten.reshape}
_SAME = {aten.clone, aten.alias, aten.detach, aten._to_copy}
_SUMS = {aten.sum, aten.mean, aten.amax, aten.amin}
_PRODUCTS = {aten.mm: 0, aten.addmm: 1}  # -> which argument has the rows
_TURNS = {aten.t, aten.transpose, aten.permute}
_OF_WEIGHTS = {*_VIEWS, *_SAME, *_TURNS, aten.slice, spx.all_gather, spx.shard}


@dataclass(frozen=True)
class Cut:
    """A dim as [outer, parts, inner]."""

    dim: int
    inner: int
    parts: int

    def of_size(self, shape: Sequence[int]) -> list[int]:
        """The shape of one part."""
        return [size // self.parts if dim == self.dim else size for dim, size in enumerate(shape)]


def is_whole_product(node: fx.Node) -> bool:
    """Whether a call is a product of two matrices."""
    return packet_of(node) in _PRODUCTS


def is_made_of_weights(node: fx.Node) -> bool:
    """Whether a value has elements of an input alone, in another order, as a weight that is gathered and turned."""
    while node.op == "call_function" and packet_of(node) in _OF_WEIGHTS:
        node = operand(node, 0)
    return node.op == "placeholder"


def joined_parts(node: fx.Node, cut: Cut) -> list[fx.Node] | None:
    """The parts where this call puts just them together."""
    if packet_of(node) is not aten.cat:
        return None
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    sizes = [shape_of(part)[cut.dim] for part in parts]
    is_it = dim % len(shape_of(node)) == cut.dim and len(parts) == cut.parts and set(sizes) == {cut.inner}  # type: ignore[operator]
    return list(parts) if is_it else None


def cuts_of_operands(node: fx.Node, cut: Cut) -> dict[fx.Node, Cut] | None:
    """Which operands of a call are cut where its value is, and how; others are read whole. None: it cannot be."""
    packet = packet_of(node)
    found: dict[fx.Node, Cut | None]
    if packet in _VIEWS:
        found = {operand(node, 0): _through_view(shape_of(operand(node, 0)), shape_of(node), cut)}
    elif packet in _PRODUCTS:
        found = _through_product(node, cut)
    elif is_getitem(node) or packet in {*_SAME, *_TURNS, *_SUMS, aten.split, aten.split_with_sizes}:
        found = {operand(node, 0): _through_one(node, cut)}
    elif packet in {aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.constant_pad_nd, spx.mask_padding}:
        found = {operand(node, 0): _through_shape(node, cut)}
    elif packet is aten.cat:
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        sizes = [shape_of(value)[cut.dim] for value in node.all_input_nodes]
        fits = dim % len(shape_of(node)) != cut.dim or all(size % (cut.inner * cut.parts) == 0 for size in sizes)
        found = dict.fromkeys(node.all_input_nodes, cut if fits else None)
    elif packet is aten.expand or _is_elementwise(node):
        return _through_broadcast(node, cut)
    else:
        return None
    known = {value: own for value, own in found.items() if own is not None}
    return known if len(known) == len(found) else None


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and is_tensor(node)


def _through_view(before: Sequence[Any], after: Sequence[Any], cut: Cut) -> Cut | None:
    """The same part of the operand of a view: where elements so far apart belong to one dim of it."""
    stride = math.prod(after[cut.dim + 1 :]) * cut.inner
    for dim, size in enumerate(before):
        behind = math.prod(before[dim + 1 :])
        if stride % behind == 0 and size % (stride // behind * cut.parts) == 0:
            return Cut(dim, stride // behind, cut.parts)
    return None


def _through_product(node: fx.Node, cut: Cut) -> dict[fx.Node, Cut | None]:
    place = _PRODUCTS[packet_of(node)]
    matrix = operand(node, place + 1)
    is_column = cut.dim == 1 and is_made_of_weights(matrix) and not is_made_of_weights(operand(node, place))
    found: dict[fx.Node, Cut | None] = {matrix: cut if is_column else None}
    if place:
        bias = operand(node, 0)
        if shape_of(bias)[-1] != 1:
            found[bias] = Cut(len(shape_of(bias)) - 1, cut.inner, cut.parts) if is_made_of_weights(bias) else None
    return found


def _through_one(node: fx.Node, cut: Cut) -> Cut | None:
    """Through a call of one operand that has the dim of its value, at one place or another."""
    packet, x = packet_of(node), operand(node, 0)
    if is_getitem(node):
        return cut if packet_of(x) in {aten.split, aten.split_with_sizes} and is_tensor(operand(x, 0)) else None
    if packet in _SAME:
        return cut
    rank = len(shape_of(x))
    if packet is aten.t:
        return Cut(1 - cut.dim, cut.inner, cut.parts) if rank == 2 else None
    if packet in {aten.split, aten.split_with_sizes}:
        dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        return cut if dim % rank != cut.dim else None
    if packet in {aten.transpose, aten.permute}:
        order, dims = list(range(rank)), pytree.arg_tree_leaves(*node.args[1:])
        if packet is aten.permute:
            order = [d % rank for d in dims]
        else:
            first, second = (d % rank for d in dims)
            order[first], order[second] = second, first
        return Cut(order[cut.dim], cut.inner, cut.parts)
    return _through_sum(node, cut, rank)


def _through_sum(node: fx.Node, cut: Cut, rank: int) -> Cut | None:
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if dims is None:
        return None
    summed = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    keeps = len(node.args) > 2 and node.args[2]
    left = list(range(rank)) if keeps else [d for d in range(rank) if d not in summed]
    dim = left[cut.dim]
    return Cut(dim, cut.inner, cut.parts) if summed and dim not in summed else None


def _through_shape(node: fx.Node, cut: Cut) -> Cut | None:
    """Through a call that takes some of another dim, or adds or drops one."""
    packet, rank = packet_of(node), len(shape_of(operand(node, 0)))
    if packet is aten.constant_pad_nd:
        pads: Any = node.args[1]
        padded = {rank - 1 - at // 2 for at, size in enumerate(pads) if size}
        return cut if cut.dim not in padded else None
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(dim, int):
        return None
    dim %= rank + 1 if packet is aten.unsqueeze else rank
    if packet in {aten.slice, spx.mask_padding}:
        return cut if dim != cut.dim else None
    if packet is aten.unsqueeze:
        return Cut(cut.dim - (cut.dim > dim), cut.inner, cut.parts) if dim != cut.dim else None
    if packet is aten.squeeze and len(shape_of(node)) == rank:
        return cut
    return Cut(cut.dim + (cut.dim >= dim), cut.inner, cut.parts)


def _through_broadcast(node: fx.Node, cut: Cut) -> dict[fx.Node, Cut] | None:
    """Operands that have the dim are cut; none of which they are views may be of one element there."""
    rank, size = len(shape_of(node)), shape_of(node)[cut.dim]
    found: dict[fx.Node, Cut] = {}
    for value in node.all_input_nodes:
        if not is_tensor(value):
            return None
        dim = cut.dim - rank + len(shape_of(value))
        if dim < 0 or shape_of(value)[dim] == 1:
            continue
        if shape_of(value)[dim] != size:
            return None
        found[value] = Cut(dim, cut.inner, cut.parts)
    return found or None


class PartsOfValues:
    """Finds what can be cut, and writes parts. written: all calls that were. products: cut, with how."""

    def __init__(self) -> None:
        self._reaches: dict[tuple[fx.Node, Cut], bool] = {}
        self._parts: dict[tuple[fx.Node, Cut, int], fx.Node] = {}
        self.written: list[fx.Node] = []
        self.products: dict[fx.Node, Cut] = {}

    def reaches(self, node: fx.Node, cut: Cut) -> bool:
        """Whether all that a part is made of ends at products with cut matrices, or where parts are put together."""
        if (node, cut) not in self._reaches:
            self._reaches[node, cut] = self._reaches_from(node, cut)
        return self._reaches[node, cut]

    def forget_what_reaches(self) -> None:
        """Where the graph was changed."""
        self._reaches.clear()

    def _reaches_from(self, node: fx.Node, cut: Cut) -> bool:
        if node.op != "call_function":
            return False
        if joined_parts(node, cut) is not None:
            return True
        operands = cuts_of_operands(node, cut)
        if not operands:
            return False
        if is_whole_product(node):
            return True
        return all(self.reaches(value, own) or is_made_of_weights(value) for value, own in operands.items())

    def joins_under(self, node: fx.Node, cut: Cut) -> list[fx.Node]:
        """The calls that put parts together in which the cut of a value ends."""
        if joined_parts(node, cut) is not None:
            return [node]
        if node.op != "call_function" or is_whole_product(node):
            return []
        operands = cuts_of_operands(node, cut) or {}
        return [join for value, own in operands.items() for join in self.joins_under(value, own)]

    def part(self, node: fx.Node, cut: Cut, number: int, before: fx.Node) -> fx.Node:
        """A part of a value. before: the call in front of which new calls go."""
        key = (node, cut, number)
        if key not in self._parts:
            self._parts[key] = self._written_part(node, cut, number, before)
        return self._parts[key]

    def join(self, like: fx.Node, cut: Cut, pieces: Sequence[fx.Node], before: fx.Node) -> fx.Node:
        """All parts put together."""
        shape = list(shape_of(like))
        outer = shape[cut.dim] // (cut.parts * cut.inner)
        seen = [*shape[: cut.dim], outer, cut.inner, *shape[cut.dim + 1 :]]
        views = [self._call(aten.view.default, piece, seen, like=like, before=before) for piece in pieces]
        whole = self._call(aten.cat.default, views, cut.dim + 1, like=like, before=before)
        return self._call(aten.view.default, whole, shape, like=like, before=before)

    def _call(self, target: Any, *args: Any, like: fx.Node, before: fx.Node) -> fx.Node:
        node = call(like.graph, target, args, like=like, before=before)
        for name in ("partitioner_tag", "seq_nr", "custom"):
            if name in like.meta:
                node.meta[name] = like.meta[name]
        self.written.append(node)
        return node

    def _written_part(self, node: fx.Node, cut: Cut, number: int, before: fx.Node) -> fx.Node:
        parts = joined_parts(node, cut)
        if parts is not None:
            return parts[number]
        operands = cuts_of_operands(node, cut) if node.op == "call_function" else None
        if not operands or not (self.reaches(node, cut) or is_made_of_weights(node)):
            return self._taken_out(node, cut, number, before)
        if is_whole_product(node):
            self.products[node] = cut
        new = {value: self.part(value, own, number, before) for value, own in operands.items()}
        args: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda value: new.get(value, value))
        if packet_of(node) in _VIEWS:
            return self._viewed(args[0], cut.of_size(shape_of(node)), node, before)
        if packet_of(node) is aten.expand:
            args = (args[0], cut.of_size(shape_of(node)), *args[2:])
        written = call(node.graph, node.target, args, kwargs, like=node, before=before)  # type: ignore[arg-type]
        written.meta = {**node.meta, "val": written.meta["val"]}
        self.written.append(written)
        return written

    def _viewed(self, x: fx.Node, shape: Sequence[int], like: fx.Node, before: fx.Node) -> fx.Node:
        """A view of a part, of a copy where the part's elements do not lie so."""
        try:
            return self._call(aten.view.default, x, list(shape), like=like, before=before)
        except (RuntimeError, ValueError):
            like.graph.erase_node(before.prev)
            copy = self._call(aten.clone.default, x, like=like, before=before)
            copy.kwargs = {"memory_format": torch.contiguous_format}
            copy.meta["val"] = copy.meta["val"].contiguous()
            return self._call(aten.view.default, copy, list(shape), like=like, before=before)

    def _taken_out(self, node: fx.Node, cut: Cut, number: int, before: fx.Node) -> fx.Node:
        """A part of a value that is there, such as of a weight: copied, and copied once more by the backward."""
        shape = list(shape_of(node))
        outer = shape[cut.dim] // (cut.parts * cut.inner)
        if outer == 1:
            start = number * cut.inner
            found = self._call(aten.slice.Tensor, node, cut.dim, start, start + cut.inner, like=node, before=before)
        else:
            seen = [*shape[: cut.dim], outer, cut.parts, cut.inner, *shape[cut.dim + 1 :]]
            view = self._viewed(node, seen, node, before)
            part = self._call(aten.select.int, view, cut.dim + 1, number, like=node, before=before)
            found = self._viewed(part, cut.of_size(shape), node, before)
        if is_made_of_weights(node):
            for made in (found, *found.all_input_nodes):
                if made in self.written:
                    made.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return found
