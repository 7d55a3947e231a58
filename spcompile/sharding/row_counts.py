"""Over dp, a size that the model reads is that of one rank's rows, while a sum over rows is that of all ranks.

A mean counts all rows. But `loss.sum() / x.shape[0]` divides the sum of all rows by the number of one rank's. Where it
is known what counts rows (`row_symbols`), such numbers become those of all ranks. Where it is not, the number is a
literal like any other; then a literal that scales a sum over rows and could be a count of the rank's own rows or tokens
is an error: a loss that is `dp` times too large would be worse.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.capture.capture import OTHER_SIZES, ROW_SYMBOL
from spcompile.diagnostics import BatchNotSplit, source_of
from spcompile.graph.edit import argument
from spcompile.graph.sizes import hint, same
from spcompile.sharding.index_spaces import IndexSpaces
from spcompile.sharding.propagate import Placements, shards_results
from spcompile.sharding.rules.base import tensor_results
from spcompile.sharding.rules.indexing import is_range
from spcompile.sharding.spaces import leaves

aten = torch.ops.aten

COUNTS = "spx_counts"  # in meta["custom"]: {place among the arguments, or name: Count}
ROW_DIMS = "spx_row_dims"  # in meta["custom"] of a reshape: shape of the result, symbols of its dims, of its operand


class Count(NamedTuple):
    """A number that counts rows, or a symbolic one that depends on them.

    symbols: of the rows. number: None for a symbolic one. whole: the number with all ranks' rows; of a symbolic one,
    how many times as large it would be, None where that is not the same for all values of the other symbols.
    """

    symbols: tuple[str, ...]
    number: Any
    whole: Any


_SCALES = (aten.div.Tensor, aten.div.Scalar, aten.mul.Tensor, aten.mul.Scalar)
_ON_THE_WAY = (*_SCALES, aten.neg.default, aten.to.dtype, aten._to_copy.default)
_ONES_LIKE = (aten.ones_like.default, aten.new_ones.default)
_LARGE = 2**20  # numbers


def require_no_counts(graph: fx.Graph, spaces: IndexSpaces, placements: Placements, rows: int | None) -> None:
    """Check every literal that scales a sum over rows, and every reshape with a size that is inferred.

    rows: where several stand for one, how many.

    Raises:
        BatchNotSplit: a literal that may be a count, or a reshape that may have put rows into the inferred dim.
    """
    if rows is None:
        _require_inferred_rows(graph, placements)
    counts = _counts(graph, placements, rows)
    sums = [n for n, choice in placements.choices.items() if not shards_results(spaces.calls[n], choice)]
    of_all = set(_behind(sums, placements, set()))
    scales = [scale for total in sums if not _is_mean(total) for scale in _before(total)]
    scales += [n for n in _behind([n for n in sums if not _is_mean(n)], placements, of_all) if n.target in _SCALES]
    for node in scales:
        if COUNTS in node.meta.get("custom", {}):
            continue
        number = next((found for arg in node.args[:2] if (found := _number(arg)) is not None), None)
        if number is None:
            continue
        count = _as_count(node, number)
        if count in counts:
            raise BatchNotSplit(
                f"a sum over the rows of all ranks is scaled by {number:g}, which may be how many this rank has",
                where=source_of(node),
                legal="a mean over the rows, a division by a sum such as `mask.sum()`, or DDP over dp",
            )


def all_counts_are_known(graph: fx.Graph) -> bool:
    """Whether every number that counts rows of the user's tensors had a symbol."""
    return not any(n.meta.get(OTHER_SIZES, True) for n in graph.find_nodes(op="placeholder"))


def count_all_rows(graph: fx.Graph, placements: Placements) -> int | None:
    """Let numbers that count rows count those of all ranks; returns how many, None where it is not known what they are.

    Raises:
        BatchNotSplit: a number of rows and of something else, or a reshape that puts rows of one rank in other places
            than the rows of all.
    """
    inputs = [n for n in graph.find_nodes(op="placeholder") if (n, 0) in placements.places]
    if not inputs or not all(ROW_SYMBOL in n.meta and placements.places[n, 0].dim == 0 for n in inputs):
        return None
    rows = {n.meta[ROW_SYMBOL] for n in inputs}
    changed, of_inputs = 0, set(inputs)
    for node in list(graph.nodes):
        custom = node.meta.get("custom", {})
        for place, count in custom.get(COUNTS, {}).items():
            changed += _count_all(node, place, count, rows)
        if not of_inputs.isdisjoint(node.all_input_nodes):
            of_inputs.add(node)
        if ROW_DIMS in custom:
            _require_row_dim(node, placements, of_inputs, rows)
    return changed


def _count_all(node: fx.Node, place: int | str, count: Count, rows: set[str]) -> bool:
    given = node.kwargs.get(place) if isinstance(place, str) else node.args[place] if place < len(node.args) else None
    of_this = isinstance(given, fx.Node) if count.number is None else given == count.number
    if not of_this or rows.isdisjoint(count.symbols):
        return False  # of another call, which a pass has put in the place of the one that counts; or of no rows
    if count.whole is None or not rows.issuperset(count.symbols):
        found = f"argument {place} of {node.target} depends on the number of rows of the batch and on other sizes"
        raise BatchNotSplit(found, where=source_of(node), legal="numbers that depend on the rows alone, or DDP over dp")
    whole = count.whole
    if isinstance(given, fx.Node):
        with node.graph.inserting_before(node):
            times = node.graph.call_function(operator.mul, (given, whole))
        times.meta = {**given.meta, "val": given.meta["val"] * whole}
        whole = times
    if isinstance(place, str):
        node.kwargs = {**node.kwargs, place: whole}
    else:
        node.args = (*node.args[:place], whole, *node.args[place + 1 :])
    counts = {other: c for other, c in node.meta["custom"][COUNTS].items() if other != place}
    node.meta["custom"] = {**node.meta["custom"], COUNTS: counts}
    return True


def _require_row_dim(node: fx.Node, placements: Placements, of_inputs: set[fx.Node], rows: set[str]) -> None:
    """A rank may only have its part of a dim of a reshape that grows with the rows, and must have it."""
    shape, dims, source = node.meta["custom"][ROW_DIMS]
    if tuple(map(hint, node.meta["val"].shape)) != shape or rows.isdisjoint(source) or node not in of_inputs:
        return  # another call, which a pass has put in the place of the reshape; or no rows
    place = placements.places.get((node, 0))
    growing = [dim for dim, symbols in dims.items() if not rows.isdisjoint(symbols)]
    if place is not None and place.dim in growing:
        return
    raise _misplaced(node)


def _require_inferred_rows(graph: fx.Graph, placements: Placements) -> None:
    """Where a reshape cuts the dim of the rows in two and one size is inferred, that one grows with the rows."""
    for node in graph.nodes:
        place = placements.places.get((node, 0))
        if place is None or node.target is not aten.reshape.default or -1 not in node.args[1]:
            continue
        inferred, source = node.args[1].index(-1), placements.places.get((node.args[0], 0))
        shape, before = node.meta["val"].shape, node.args[0].meta["val"].shape
        if source is None or abs(inferred - place.dim) != 1:
            continue
        if same(shape[place.dim] * shape[inferred], before[source.dim]):
            raise _misplaced(node)


def _misplaced(node: fx.Node) -> BatchNotSplit:
    shape = [hint(size) for size in node.meta["val"].shape]
    return BatchNotSplit(
        f"{node.name} {shape} puts a rank's rows where they would not be among the rows of all ranks",
        where=source_of(node),
        legal="two groups of rows or more on every rank, parts of equally many rows each, or DDP over dp",
    )


def require_equal_rows(graph: fx.Graph, spaces: IndexSpaces, placements: Placements) -> None:
    """Each rank makes the constants of its own rows: they must not depend on where a row is among all.

    Raises:
        BatchNotSplit: a constant is another in each row.
    """
    for node in graph.nodes:
        place = placements.places.get((node, 0))
        if place is None or node.op != "call_function" or all(_reads_in_each_row(node, user) for user in node.users):
            continue
        try:
            value = evaluate_constant(node)
        except NotConstant:
            continue
        factors = [hint(space.size) for space in leaves(spaces.values[node][0][place.dim])]
        by_row = value.unflatten(place.dim, factors).movedim(place.dim + place.part, 0)
        if not torch.equal(by_row, by_row[:1].expand_as(by_row)):
            raise BatchNotSplit(
                f"{node.name} is another constant in each row, as a row's number is, and each rank has rows 0, 1, ...",
                where=source_of(node),
                legal="an input of the model with what belongs to each row, or DDP over dp",
            )


def _reads_in_each_row(node: fx.Node, user: fx.Node) -> bool:
    """Whether a call reads a range as the number of a row, to find something in each."""
    if user.target in (aten.unsqueeze.default, aten.reshape.default):
        return all(_reads_in_each_row(user, reader) for reader in user.users)
    if user.target is not aten.index.Tensor:
        return False
    x, indices = user.args
    at = [d for d, read in enumerate(indices) if read is node]  # type: ignore[arg-type]
    return all(is_range(node, x.meta["val"].shape[d]) for d in at)  # type: ignore[union-attr]


def _counts(graph: fx.Graph, placements: Placements, rows: int | None) -> set[int]:
    """How many rows, tokens or numbers this rank has: products of the first sizes of every value that has rows."""
    found = set()
    for node in graph.nodes:
        for number, value in enumerate(tensor_results(node)):
            place = placements.places.get((node, number))
            if place is not None:
                own = [hint(size) for size in value.shape]
                own[place.dim] //= rows or 1
                found |= {math.prod(own[:end]) for end in range(place.dim + 1, len(own) + 1)}
    return found


def _is_mean(total: fx.Node) -> bool:
    """Whether an op counts what it sums: that is completed with all ranks' counts."""
    if total.target in (aten.mean.default, aten.mean.dim):
        return True
    schema = getattr(total.target, "_schema", None)
    place = next((i for i, a in enumerate(schema.arguments) if a.name == "reduction"), None) if schema else None
    return place is not None and argument(total, place, "reduction", 1) == 1


def _before(total: fx.Node) -> Iterator[fx.Node]:
    """What scales the terms of a sum, right in front of it."""
    node = total.args[0] if total.args else None
    while isinstance(node, fx.Node) and node.target in _ON_THE_WAY:
        if node.target in _SCALES:
            yield node
        node = node.args[0]


def _behind(totals: Sequence[fx.Node], placements: Placements, of_all: set[fx.Node]) -> Iterator[fx.Node]:
    """The totals and what is computed from them, up to a quotient of two of `of_all`, which counts what it sums."""
    seen, queue = set(totals), list(totals)
    while queue:
        node = queue.pop()
        yield node
        for user in node.users:
            is_quotient = user.target is aten.div.Tensor and of_all.issuperset(user.args[:2])
            if not (user in seen or is_quotient or user.op != "call_function" or (user, 0) in placements.places):
                seen.add(user)
                queue.append(user)


def _number(arg: Any) -> float | None:
    """A literal, or the one number of a tensor that is made of literals alone, such as a sum of ones."""
    if isinstance(arg, int | float) and not isinstance(arg, bool):
        return float(arg)
    if not isinstance(arg, fx.Node) or not isinstance(arg.meta.get("val"), Tensor) or arg.meta["val"].numel() != 1:
        return None
    try:
        return float(evaluate_constant(arg))
    except NotConstant:
        return None


class NotConstant(Exception):
    """Not made of literals alone, or too large to be worth a look."""


def evaluate_constant(node: fx.Node) -> Any:
    """A tensor that is made of literals alone.

    Raises:
        NotConstant: it is not.
    """
    example = node.meta.get("val")
    if not isinstance(example, Tensor) or hint(example.numel()) > _LARGE:
        raise NotConstant
    if node.op == "get_attr":
        return getattr(node.graph.owning_module, str(node.target)).cpu()
    tag = torch.Tag.nondeterministic_seeded
    if node.op != "call_function" or tag in getattr(node.target, "tags", ()):
        raise NotConstant
    if node.target in _ONES_LIKE:
        return torch.ones([hint(size) for size in example.shape], dtype=example.dtype)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), evaluate_constant)
    return node.target(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))  # type: ignore[operator]


def _as_count(scale: fx.Node, number: float) -> int | None:
    """What a factor is one over, or a divisor is. One counts only as a divisor: factors of one are common."""
    is_divisor = scale.target in (aten.div.Tensor, aten.div.Scalar)
    if number == 0 or (not is_divisor and abs(number) >= 1):
        return None
    count = number if is_divisor else 1 / number
    whole = round(count)
    return whole if abs(count - whole) <= 1e-6 * abs(whole) and whole > 0 else None
