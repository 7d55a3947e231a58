"""Calls along a split dim for which ranks send each other elements: what goes elsewhere, and what windows share."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.machine.sequence import chunks_per_rank, local_length
from spcompile.sharding.layout import layout_of
from spcompile.sharding.propagate import Choice, place_of, space_at
from spcompile.sharding.rules.rule import LocalCall, Move, Size, tensor_results
from spcompile.sharding.spaces import Space, leaves
from spcompile.sharding.split_dims import SplitDims

spx = torch.ops.spx


def run_moved(split: SplitDims, n: fx.Node, choice: Choice, operands: Sequence[Tensor]) -> Any:
    """A call that puts elements of its operands elsewhere: each of its moves by itself, and their sum."""
    layout, read = layout_of(n), tensor_operands(n)
    assert layout is not None
    assert layout.call is not None
    rule, results = layout.call.rule, []
    for number, (example, dims, names) in enumerate(zip(tensor_results(n), layout.dims, rule.results, strict=True)):
        target = place_of(names, layout.call, choice)
        parts = []
        for move in (move for move in rule.moves if move.result == number):
            source = place_of(rule.operands[move.operand], layout.call, choice)
            operand_layout = layout_of(read[move.operand])
            assert operand_layout is not None
            held = None if source is None else leaves(operand_layout.dims[0][source.dim])
            wanted = None if target is None else leaves(dims[target.dim])
            part = _run_move(split, operands[move.operand], move, held, wanted)
            parts.append(part.to(example.dtype) if example.ndim == part.ndim else part.squeeze(move.dim))
        result = functools.reduce(torch.add, parts)
        if target is not None and example.is_floating_point() and split.padded(leaves(dims[target.dim])[0]):
            spaces = [leaves(dim) for dim in dims]
            result = split.on_split_dim(result, spaces, target, True, split.mask_benignly)
        results.append(result)
    return results if isinstance(n.meta["val"], list | tuple) else results[0]


def _run_move(split: SplitDims, x: Tensor, move: Move, held: list[Space] | None, wanted: list[Space] | None) -> Tensor:
    """One move, from a dim that is split into `held` factors to one of `wanted`; None: ranks have it whole."""
    axis, degree, order = split.axis, split.degree, split.order
    if held is None:
        assert wanted is not None, "a move from a whole dim to a whole dim"
        x = x if same(x.shape[move.dim], move.count) else x.narrow(move.dim, move.start, move.count)
        return spx.place(x, move.dim, move.to, *split.length_and_unit(wanted), axis, degree, order)
    if wanted is not None:
        old, new = split.length_and_unit(held), split.length_and_unit(wanted)
        return spx.move(x, move.dim, move.start, move.count, *old, move.to, *new, axis, degree, order)
    own = spx.pick(x, move.dim, move.start, move.count, *split.length_and_unit(held), axis, degree, order)
    return spx.all_reduce(own, axis, degree, "I")


def run_windowed(
    split: SplitDims, n: fx.Node, choice: Choice, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """A call of which each element is made of neighbours: each chunk of the result from just what it reads."""
    layout, (example,), (x, *others) = layout_of(n), tensor_results(n), args
    assert layout is not None
    assert layout.call is not None
    rule, held = layout.call.rule, layout.call.leaves_of(layout.call.rule.windows[choice.factor].of)
    window, wanted = rule.windows[choice.factor], layout.call.leaves_of(choice.factor)
    source, target = (place_of(dims[0], layout.call, choice) for dims in (rule.operands, rule.results))
    assert source is not None
    assert target is not None
    count = math.prod(space.find().size for space in held)
    made = (window.step, window.before, window.extent, *split.length_and_unit(wanted))
    ranks = (split.axis, split.degree, split.order)
    read = spx.halo(x, source.dim, count, *split.length_and_unit(held), *made, *ranks)
    chunks = read.chunk(chunks_per_rank(split.order), source.dim)
    calls = [LocalCall((chunk, *others), kwargs, (), choice.factor, count, split.degree) for chunk in chunks]
    parts = [window.local(call) for call in calls]
    majors = [leaf.find().size for leaf in leaves(layout.dims[0][target.dim])[: target.part]]
    result = _side_by_side(parts, target.dim, math.prod(majors))
    if not example.is_floating_point() or not split.padded(wanted[0]):
        return result
    return split.on_split_dim(result, [leaves(dim) for dim in layout.dims[0]], target, True, split.mask_benignly)


def _side_by_side(parts: Sequence[Tensor], dim: int, majors: Size) -> Tensor:
    """Chunks of a dim put together; the dim holds `majors` elements of other dims, each with chunks of its own."""
    if len(parts) < 2 or same(majors, 1):
        return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]
    return torch.cat([part.unflatten(dim, (majors, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)


def run_mirrored(split: SplitDims, n: fx.Node, choice: Choice, x: Tensor) -> Tensor:
    """A flip of a split dim. In zigzag order a rank has places of both ends: flipped, only padding is in the way."""
    layout, ranks = layout_of(n), (split.axis, split.degree)
    assert layout is not None
    assert layout.call is not None
    dims, place = [leaves(dim) for dim in layout.dims[0]], place_of(layout.call.rule.results[0], layout.call, choice)
    assert place is not None
    flipped = {dim % x.ndim for dim in named_arguments(n.target, n.args, n.kwargs)["dims"]}
    others = len(dims[place.dim])

    def mirrored(x: Tensor, dim: int, space: Space) -> Tensor:
        length = split.capacity(space)
        padded = local_length(length, split.degree, "zigzag") * split.degree
        if split.order != "zigzag":
            x = spx.reorder(x, dim, length, *ranks, split.order, "zigzag")
        first = dim - place.part
        x, whole = x.flip(list(range(first, first + others))), space.find().size
        x = spx.move(x, dim, padded - whole, whole, length, 1, 0, length, 1, *ranks, "zigzag")
        return x if split.order == "zigzag" else spx.reorder(x, dim, length, *ranks, "zigzag", split.order)

    x = x.flip(list(flipped - {place.dim})) if len(flipped) > 1 else x
    result = split.on_split_dim(x, dims, place, True, mirrored)
    if not x.is_floating_point() or not split.padded(space_at(dims, place)):
        return result
    return split.on_split_dim(result, dims, place, True, split.mask_benignly)
