"""Rules of ops on rows in an order of each rank's own: `a -> a` for a sort, `b c, (a b) -> (a b) c` for an index.

A sort has such an order where nothing that reads it can tell it from the order over all rows (`sharding/shuffles.py`).
Then each rank sorts its own rows. A place in the unsorted rows is a place in the rank's own, so an index shares its
factors with what it reads: rank by rank, rows and their places are the same.

`pieces`: the sizes of the factors that the unsorted rows are read as, major first; none of them is 1.
`span`: the first of the pieces that a place counts, and the first behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils._pytree import tree_leaves

from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Dim, Factor, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, Size, tensor_results

Pieces = tuple[Size, ...]
Span = tuple[int, int]


def sorted_rows(node: fx.Node) -> OpRule:
    """`a -> a, a`: each rank sorts its own rows."""
    (name,) = (key for key, value in arguments(node).items() if isinstance(value, Tensor))
    rows = factors(arguments(node)[name].shape)
    return make_rule(node, {name: rows}, [rows for _ in tensor_results(node)])


def picked_places(node: fx.Node) -> OpRule:
    """`a b -> (a b), (a b)`: the places of what is not zero, of which each rank has those among its own rows.

    The size of a dim of picked rows is that of all rows. How many were picked only the picked rows themselves say.
    """
    (name,) = (key for key, value in arguments(node).items() if isinstance(value, Tensor))
    dims = factors(arguments(node)[name].shape)
    return make_rule(node, {name: dims}, [[tuple(dims)] for _ in tensor_results(node)])


def of_picked_rows(rule: OpRule, name: str, size: Size) -> OpRule:
    """A rule with picked rows for factor `name`, out of `size`: what its local form makes has as many as it reads."""
    reads = next((i, dims.index((name,))) for i, dims in enumerate(rule.operands) if (name,) in dims)

    def local(call: LocalCall) -> Any:
        tensors = [x for x in tree_leaves((call.args, dict(call.kwargs))) if isinstance(x, Tensor)]
        count = tensors[reads[0]].shape[reads[1]]
        shapes = tuple(
            tuple(count if dim == (name,) else length for dim, length in zip(dims, shape, strict=True))
            for dims, shape in zip(rule.results, call.shapes, strict=True)
        )
        assert rule.local is not None
        return rule.local(replace(call, shapes=shapes))

    return replace(rule, sizes={**rule.sizes, name: size}, local=local if rule.local is not None else None)


def part_of_place(node: fx.Node, pieces: Pieces, divided: Span) -> OpRule:
    """`(a b c) -> (a b c)`, a quotient or a remainder of places: the divisor counts a rank's part of `divided`."""
    rows = tuple(Factor(size) for size in pieces)

    def local(call: LocalCall) -> Any:
        args = named_arguments(node.target, call.args, call.kwargs)
        split = rule.results[0][0].index(call.factor)
        if divided[0] <= split < divided[1]:
            args["other"] = call.shapes[0][0] // math.prod((*pieces[: divided[0]], *pieces[divided[1] :]))
        return node.target(**args)  # type: ignore[operator]

    rule = make_rule(node, {"self": [rows]}, [[rows]], local=local)
    return rule


def read_at(node: fx.Node, pieces: Pieces, spans: Mapping[int, Span]) -> OpRule:
    """`b c, (a b) -> (a b) c`: dim d of what is read is counted by the places of `spans[d]`."""
    rows = tuple(Factor(size) for size in pieces)
    shape = _first(node).shape
    dims = [_span(rows, spans[d]) if d in spans else Factor(size) for d, size in enumerate(shape)]
    first = min(spans)
    rest = [dim for d, dim in enumerate(dims) if d not in spans]
    layouts = _with_indices(node, dims, [rows], len(spans))
    return make_rule(node, layouts, [[*rest[:first], rows, *rest[first:]]])


def put_back(node: fx.Node, dim: int) -> OpRule:
    """`a b, a -> a b`: sorted rows are read, or written to, at the places of all of them."""
    dims = factors(_first(node).shape)
    layouts = _with_indices(node, dims, [dims[dim]], 1)
    return make_rule(node, {**layouts, "values": dims, "source": dims, "src": dims}, [dims])


def inverted(node: fx.Node) -> OpRule:
    """`a, a, [b] -> a`: 0, 1, 2, ... are written at all places, by which a permutation is inverted."""
    rows = factors(_first(node).shape)
    source = "values" if "values" in arguments(node) else "src" if "src" in arguments(node) else "source"
    operands = {**_with_indices(node, rows, rows, 1), source: factors(_first(node).shape, replicated=True)}

    def local(call: LocalCall) -> Any:
        args = named_arguments(node.target, call.args, call.kwargs)
        own = torch.arange(call.shapes[0][0], device=args[source].device, dtype=args[source].dtype)
        return node.target(**{**args, source: own})  # type: ignore[operator]

    return make_rule(node, operands, [rows], local=local, unread=(source,))


def added_at(node: fx.Node, dim: int, pieces: Pieces, span: Span) -> OpRule:
    """`b c, (a b), (a b) c -> b c`: sorted rows are added at places of `span`."""
    rows = tuple(Factor(size, replicated=not span[0] <= at < span[1]) for at, size in enumerate(pieces))
    others = factors(_first(node).shape)
    dims: list[Dim] = [_span(rows, span) if d == dim else factor for d, factor in enumerate(others)]
    source: list[Dim] = [rows if d == dim else factor for d, factor in enumerate(others)]
    is_scatter = isinstance(index := arguments(node).get("index"), Tensor) and index.ndim > 1
    layouts = _with_indices(node, dims, source if is_scatter else [rows], 1)
    return make_rule(node, {**layouts, "values": source, "source": source, "src": source}, [dims])


def gathered_at(node: fx.Node, dim: int, pieces: Pieces, span: Span) -> OpRule:
    """`b c, (a b) c -> (a b) c`: `gather` along `dim`, whose index is alike along all other dims."""
    rows = tuple(Factor(size) for size in pieces)
    out: list[Dim] = [rows if d == dim else factor for d, factor in enumerate(factors(tensor_results(node)[0].shape))]
    dims = [_span(rows, span) if d == dim else factor for d, factor in enumerate(out)]
    return make_rule(node, {"self": dims, "index": out}, [out])


def grouped_rows(node: fx.Node) -> OpRule:
    """`a c, [d] c b, [d] -> a b | c: sum`: each rank has the ends of its own groups."""
    args = arguments(node)
    (x, w), ends = [name for name, value in args.items() if isinstance(value, Tensor) and value.ndim > 1], "offs"
    rows, contracted = factors(args[x].shape)
    groups, columns = Factor(args[ends].shape[0], replicated=True), Factor(args[w].shape[2])
    operands = {x: [rows, contracted], w: [groups, contracted, columns], ends: [groups]}
    return make_rule(node, operands, [[rows, columns]], sums=[contracted], fills=dict.fromkeys((x, w), 0.0))


def split_in_groups(node: fx.Node) -> OpRule:
    """`a b -> a b, a b`: each rank has the sizes of its own groups. As for picked rows, a size is that of all rows."""
    dims = factors(_first(node).shape)
    return make_rule(node, {"self": dims}, [dims for _ in tensor_results(node)])


def groups_together(node: fx.Node, dim: int, total: Size) -> OpRule:
    """`a b, a b -> a b`: all groups of rows, in their order."""
    dims = factors(tensor_results(node)[0].shape)
    dims[dim] = Factor(total)
    return make_rule(node, {"tensors": [dims for _ in arguments(node)["tensors"]]}, [dims])


def own_counts(node: fx.Node, over: Sequence[int]) -> OpRule:
    """`a b -> b | a: complete`: counts of a rank's own rows, which nothing but its own groups reads.

    over: the dims that are counted; all of them where ones are added at the places that numbers say, `[b], a, a -> b`.
    """
    args = arguments(node)
    names = [name for name, value in args.items() if isinstance(value, Tensor)]
    if len(names) > 1:
        rows, out = factors(args["index"].shape), factors(tensor_results(node)[0].shape, replicated=True)
        layouts = {name: out if name == "self" else rows for name in names}
        return make_rule(node, layouts, [out], completes=rows)
    counted = factors(args[names[0]].shape)
    kept = [factor for d, factor in enumerate(counted) if d not in over]
    results = tensor_results(node)[0].shape
    out = kept if len(kept) == len(results) else factors(results, replicated=True)
    for factor in kept:
        factor.replicated = True
    return make_rule(node, {names[0]: counted}, [out], completes=[counted[d] for d in over])


def _first(node: fx.Node) -> Tensor:
    value: Tensor = arguments(node)["self"]
    return value


def _span(rows: tuple[Factor, ...], span: Span) -> Dim:
    return rows[span[0] : span[1]]


def _with_indices(node: fx.Node, dims: Sequence[Dim], index: Sequence[Dim], count: int) -> dict[str, Any]:
    """The layouts of what is indexed and of its indices, however the op calls them."""
    return (
        {"self": dims, "indices": [index] * count} if "indices" in arguments(node) else {"self": dims, "index": index}
    )
