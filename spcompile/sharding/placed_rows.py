"""Calls that read places of sorted rows: which rows they read or write there, and whether a rank could for its own.

places // k, places % k    the token of a row, and which of its k rows
x[places // k]             rows of tokens, in sorted order
y[places] = sorted         rows in the order of the tokens again
ranks[places] = 0, 1, ...  where each row went; as is places.argsort()
sorted[ranks]              rows in the order of the tokens again
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.edit import shape_of
from spcompile.graph.sizes import quotient, same, same_shape
from spcompile.sharding.row_order import Fact, Facts, Ranks, RowPlaces, Seen, SortedRows
from spcompile.sharding.rules import OpRule, shuffled
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.indexing import is_range

Result = tuple[Fact | None, OpRule]

_REMAINDERS = frozenset(overloads("remainder.Scalar remainder.Tensor fmod.Scalar fmod.Tensor"))
_ROUNDED = frozenset(overloads("div.Tensor_mode div.Scalar_mode divide.Tensor_mode divide.Scalar_mode"))
_QUOTIENTS = frozenset((*overloads("floor_divide floor_divide.Scalar"), *_ROUNDED))


def part_of_places(node: fx.Node, places: RowPlaces) -> Result:
    """A quotient or a remainder of places counts their major or their minor factors."""
    args = arguments(node)
    if node.target in _ROUNDED and args["rounding_mode"] not in ("floor", "trunc"):
        raise Seen
    if len(shape_of(node)) != 1 or isinstance(args["other"], Tensor | float):
        raise Seen
    pieces, (first, last) = list(places.pieces), places.span
    cut, rest = last, args["other"]
    while not same(rest, 1):
        cut -= 1
        if cut < first:
            raise Seen
        major, more = quotient(pieces[cut], rest), quotient(rest, pieces[cut])
        if more is not None:
            rest = more
        elif major is not None:
            pieces[cut : cut + 1] = [major, rest]
            cut, last, rest = cut + 1, last + 1, 1
        else:
            raise Seen
    span = (cut, last) if node.target in _REMAINDERS else (first, cut)
    if span[0] == span[1]:
        raise Seen
    counted = replace(places, pieces=tuple(pieces), span=span)
    return counted, shuffled.part_of_place(node, counted.pieces, (cut, last))


def read(node: fx.Node, facts: Facts) -> Result:
    """Rows of tokens are read at places, or sorted rows at where the unsorted ones went."""
    x, indices = node.args[0], _indices(node)
    found = {dim: facts.get(index) for dim, index in indices.items()}
    first = min(found)
    if len(found) == 1 and isinstance(fact := found[first], Ranks) and node.target is not _GATHER:
        if facts.get(x) != SortedRows(fact.sort, first):  # type: ignore[arg-type]
            raise Seen
        return None, shuffled.put_back(node, first)
    places = {dim: fact for dim, fact in found.items() if isinstance(fact, RowPlaces)}
    if len(places) < len(found) or x in facts:
        raise Seen
    _require_one_reading(node, places, indices)
    fact = places[first]
    rows = SortedRows(fact.sort, first)
    if node.target is _GATHER:
        return rows, shuffled.gathered_at(node, first, fact.pieces, fact.span)
    return rows, shuffled.read_at(node, fact.pieces, {dim: fact.span for dim, fact in places.items()})


def _require_one_reading(node: fx.Node, places: dict[int, RowPlaces], indices: dict[int, fx.Node]) -> None:
    """All indices read the places in one way, each another part of it, and nothing else is in the dims they index."""
    first, shape = min(places), shape_of(node.args[0])  # type: ignore[arg-type]
    along = first if node.target is _GATHER else 0
    counted = [at for fact in places.values() for at in range(*fact.span)]
    fits = (
        sorted(places) == list(range(first, first + len(places)))
        and all(_same_pieces(fact.pieces, places[first].pieces) for fact in places.values())
        and len(set(counted)) == len(counted)
        and all(fact.dim == along and same(shape[dim], fact.size) for dim, fact in places.items())
    )
    if node.target is _GATHER:
        others = zip(shape, shape_of(indices[first]), strict=True)
        fits = fits and all(d == first or same(*sizes) for d, sizes in enumerate(others))
    else:
        fits = fits and all(len(shape_of(index)) == 1 for index in indices.values())
    if not fits:
        raise Seen


def _same_pieces(a: shuffled.Pieces, b: shuffled.Pieces) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def written(node: fx.Node, facts: Facts) -> Result:
    """Sorted rows are put where they came from, or 0, 1, 2, ... are, which says where each went."""
    ((dim, index),) = _indices(node).items()
    base, rows, places = node.args[0], _rows_written(node), facts.get(index)
    if arguments(node).get("accumulate") or (isinstance(places, RowPlaces) and places.picked):
        return added(node, facts)  # of picked rows that have one place the last one stays, which is a rank's own
    if not isinstance(places, RowPlaces) or not places.is_whole or len(shape_of(index)) != 1 or base in facts:
        raise Seen
    if not same_shape(base.meta["val"], rows.meta["val"]):  # type: ignore[union-attr]
        raise Seen
    if facts.get(rows) == SortedRows(places.sort, dim):
        return None, shuffled.put_back(node, dim)
    if rows in facts or len(shape_of(rows)) != 1 or not is_range(rows, places.size):
        raise Seen
    return Ranks(places.sort), shuffled.inverted(node)


def added(node: fx.Node, facts: Facts) -> Result:
    """Sorted rows are added to those of tokens, or picked rows written."""
    ((dim, index),) = _indices(node).items()
    base, rows, places = node.args[0], _rows_written(node), facts.get(index)
    if not isinstance(places, RowPlaces) or base in facts or facts.get(rows) != SortedRows(places.sort, dim):
        raise Seen
    ours, theirs = shape_of(base), shape_of(rows)  # type: ignore[arg-type]
    if len(ours) != len(theirs) or not same(ours[dim], places.size):
        raise Seen
    if not all(d == dim or same(*sizes) for d, sizes in enumerate(zip(ours, theirs, strict=True))):
        raise Seen
    is_scatter = len(shape_of(index)) == len(theirs) > 1
    if is_scatter and (places.dim != dim or not same_shape(index.meta["val"], rows.meta["val"])):
        raise Seen
    if not is_scatter and len(shape_of(index)) != 1:
        raise Seen
    return None, shuffled.added_at(node, dim, places.pieces, places.span)


def _indices(node: fx.Node) -> dict[int, fx.Node]:
    """By what each dim of the first operand is indexed."""
    if node.target in _BY_LIST:
        return {dim: index for dim, index in enumerate(node.args[1]) if index is not None}  # type: ignore[arg-type]
    dim, index = node.args[1:3]
    return {dim % max(len(shape_of(node.args[0])), 1): index}  # type: ignore[operator,dict-item,arg-type]


def _rows_written(node: fx.Node) -> fx.Node:
    return node.args[2 if node.target in _BY_LIST else 3]  # type: ignore[return-value]


(_GATHER,) = overloads("gather")
_BY_LIST = frozenset(overloads("index.Tensor index_put _unsafe_index_put"))

# Of each op that may read places: what it does with them.
READERS: dict[Any, Callable[[fx.Node, Facts], Result]] = {
    **dict.fromkeys(overloads("index.Tensor index_select gather"), read),
    **dict.fromkeys(overloads("index_put _unsafe_index_put index_copy scatter.src"), written),
    **dict.fromkeys(overloads("index_add scatter_add"), added),
}
DIVISIONS = _QUOTIENTS | _REMAINDERS
