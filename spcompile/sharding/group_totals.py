"""Groups of rows together are all rows: sums of the sizes of all groups are a number that is known.

    x[: sum(sizes)].split(sizes)                    ->  x.split(sizes)
    cat(groups), zeros(x.shape[0] - sum(sizes))     ->  cat(groups)
    assert sum(sizes) == x.shape[0]                 ->  nothing

So code says it that may leave rows out. Here the sizes count places along a dim that has one for each group, and every
row has such a place: then none is left out. Written as symbols that would be the sum of the sizes of all ranks' groups,
of which a rank has only its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads, tensor_operands
from spcompile.graph.edit import fake_mode_of, operand, replace, shape_of
from spcompile.graph.sizes import expression, same
from spcompile.sharding.group_counts import are_below
from spcompile.sharding.group_ends import GroupEnds, all_ends
from spcompile.sharding.rules.calls import arguments

aten = torch.ops.aten
_CATS = frozenset(overloads("cat concat concatenate vstack row_stack"))


def fold_totals(graph: fx.Graph) -> int:
    """Put in the number of all rows where the sizes of all groups are added up; returns how many calls went.

    Totals: of each split the symbols of its sizes, and their sum.
    """
    totals = [(_symbols_among(ends), math.prod(shape_of(ends.key))) for ends in all_ends(graph) if _is_complete(ends)]
    if not totals:
        return 0
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _fold(node, totals)
    return before - len(graph.nodes)


def _is_complete(ends: GroupEnds) -> bool:
    """Whether each row is in a group, and there are numbers that say how many are."""
    return bool(ends.numbers) and are_below(ends.key, len(ends.numbers) // 2)


def _symbols_among(ends: GroupEnds) -> list[Any]:
    sizes = ends.numbers[len(ends.numbers) // 2 :]
    return [expression(size.meta["val"]) for size in sizes]


def _fold(node: fx.Node, totals: list[tuple[list[Any], Any]]) -> None:
    """One call: a number that is known now, an assertion that holds, or a call that changes nothing any more."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt) and (known := _known(value, totals)) is not None:
        _put_in(node, known)
    elif isinstance(value, torch.SymBool | torch.SymInt) and not node.all_input_nodes:
        _put_in(node, node.target(*node.args, **node.kwargs))  # type: ignore[operator]
    elif node.target is aten.sym_size.int and isinstance(size := _whole_size(node), int):
        _put_in(node, size)
    elif node.target is aten._assert_scalar.default and node.args[0] is True:
        node.graph.erase_node(node)
    elif node.target is aten.slice.Tensor and _takes_all(node):
        replace(node, operand(node, 0))
    elif isinstance(value, torch.Tensor):
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            _retype(node, [_simplest(size, totals) for size in value.shape])
        if node.target in _CATS:
            _without_nothing(node)


def _whole_size(node: fx.Node) -> Any:
    dim = node.args[1]
    assert isinstance(dim, int)
    return shape_of(operand(node, 0))[dim]


def _simplest(size: Any, totals: list[tuple[list[Any], Any]]) -> Any:
    known = _known(size, totals) if isinstance(size, torch.SymInt) else None
    return size if known is None else known


def _known(value: torch.SymInt, totals: list[tuple[list[Any], Any]]) -> int | None:
    """A number that is a sum of all sizes, and of numbers; or that assertions tell."""
    said = expression(value)
    if said.is_Integer:
        return int(said)
    for symbols, total in totals:
        times = said.coeff(symbols[0])
        rest = (said - times * sum(symbols) + times * expression(total)).expand()
        if rest.is_Integer and times != 0:
            return int(rest)
    return None


def _put_in(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda x: value if x is node else x)
    node.graph.erase_node(node)


def _takes_all(cut: fx.Node) -> bool:
    """Whether a slice is as long as what it is cut from."""
    args = arguments(cut)
    size = args["self"].shape[args["dim"]]
    ends = args["start"] in (0, None) and args["step"] == 1
    return ends and (args["end"] is None or (isinstance(args["end"], int) and same(args["end"], size)))


def _without_nothing(cat: fx.Node) -> None:
    """Leave out operands without rows; of a single one nothing else is left."""
    dim = arguments(cat).get("dim", 0)
    left = [x for x in tensor_operands(cat) if not same(shape_of(x)[dim], 0)]
    if len(left) == 1 and len(shape_of(left[0])) == len(shape_of(cat)):
        replace(cat, left[0])


def _retype(node: fx.Node, shape: Any) -> None:
    """Say the shape that a value is known to have now."""
    value = node.meta["val"]
    mode = fake_mode_of(value)
    assert mode is not None
    with mode:
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
