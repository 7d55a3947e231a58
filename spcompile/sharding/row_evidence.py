"""With one row a rank: is an input this rank's row, or one row that all ranks share? Both have a first dim of 1.

It matters only where rows are summed, or a gradient leaves the graph: a sum over each rank's own row goes on over `dp`,
one over a shared row does not. So each such place needs evidence. Rows are certain where attention has them, behind
such values, and where an op would refuse its operands if one of them had a single row while the others have several.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.check.states import needs_gradient, trainable_names
from spcompile.diagnostics import BatchNotSplit, source_of
from spcompile.graph.edit import is_getitem
from spcompile.graph.sizes import same
from spcompile.sharding.index_spaces import IndexSpaces
from spcompile.sharding.layout import layout_of
from spcompile.sharding.one_row import evaluate
from spcompile.sharding.propagate import Choice, Placements, place_of, shards_results
from spcompile.sharding.rules.base import tensor_operands

_LEGAL = "two rows or more on every rank of dp; for a shared input, one without a dim of 1 in front"


def require_rows(
    graph: fx.Graph, spaces: IndexSpaces, placements: Placements, seeds: dict[fx.Node, Choice], rows: int
) -> None:
    """Check that every sum over rows, and every output with a gradient, is over values that certainly have rows.

    Raises:
        BatchNotSplit: names the inputs that may be rows or shared.
    """
    certain = _certain(graph, spaces, placements, seeds, rows)
    gradient = needs_gradient(graph, trainable_names(graph))
    for node in graph.nodes:
        choice = placements.choices.get(node)
        if node.op == "output":
            read = [n for n in node.all_input_nodes if (n, 0) in placements.places and n in gradient]
            doubtful = [n for n in read if n not in certain]
        elif choice is not None and not shards_results(spaces.calls[node], choice):
            read = _split_operands(node, spaces, choice)
            doubtful = [] if any(n in certain for n in read) else read
        else:
            continue
        if doubtful:
            names = ", ".join(sorted(_inputs_of(doubtful[0], placements)))
            where = source_of(node if node.op != "output" else doubtful[0])
            found = f"{names}: one row, this rank's own or one that all ranks share, and its rows are summed"
            raise BatchNotSplit(found, where=where, legal=_LEGAL)


def require_rows_first(graph: fx.Graph) -> None:
    """Check that the batch of every input is in dim 0, where inputs of all ranks together are cut into those of each.

    Raises:
        BatchNotSplit: it is in another dim of an input.
    """
    for node in graph.find_nodes(op="placeholder"):
        layout = layout_of(node)
        place = layout.place("dp") if layout is not None else None
        if place is not None and place.dim != 0:
            raise BatchNotSplit(
                f"{node.name} has the batch in dim {place.dim}; the rows of dp's ranks were cut from dim 0",
                legal="a mesh without dp here; compiled, each rank passes its own rows, in whatever dim",
            )


def _split_operands(node: fx.Node, spaces: IndexSpaces, choice: Choice) -> list[fx.Node]:
    call = spaces.calls[node]
    pairs = zip(tensor_operands(node), call.rule.operands, strict=True)
    return [read for read, dims in pairs if place_of(dims, call, choice) is not None]


def _certain(
    graph: fx.Graph, spaces: IndexSpaces, placements: Placements, seeds: dict[fx.Node, Choice], rows: int
) -> set[fx.Node]:
    """The values that have rows however the inputs are read, to a fixed point in both directions."""
    found: set[fx.Node] = set(seeds)
    for node, choice in seeds.items():
        q_k_v = tensor_operands(node)[:3]
        found.update(n for n in _split_operands(node, spaces, choice) if n in q_k_v)
    size = -1
    while size != len(found):
        size = len(found)
        for node in (*graph.nodes, *reversed(graph.nodes)):
            if is_getitem(node):
                pair = {node, *node.all_input_nodes}
                found |= pair if pair & found else set()
                continue
            if node not in placements.choices:
                continue
            choice = placements.choices[node]
            read = _split_operands(node, spaces, choice)
            if any(n in found for n in read) and shards_results(spaces.calls[node], choice):
                found.add(node)
            if node in found and len(set(read)) == 1:
                found.update(read)
            if node in found or any(n in found for n in read):
                found.update(n for n in read if n not in found and _must_have_rows(node, n, placements, rows))
    return found


def _must_have_rows(node: fx.Node, value: fx.Node, placements: Placements, rows: int) -> bool:
    """Whether a call would refuse, or give another shape, if `value` alone had one row."""
    place = placements.places.get((value, 0))
    example = value.meta["val"]
    if place is None:
        return False
    dim = place.dim
    try:
        result = evaluate(node, {value: example.narrow(dim, 0, example.shape[dim] // rows)})
    except Exception:
        return True
    wanted = node.meta["val"]
    if not isinstance(wanted, torch.Tensor):
        return False
    return result.ndim != wanted.ndim or not all(map(same, result.shape, wanted.shape))


def _inputs_of(value: fx.Node, placements: Placements) -> set[str]:
    """The names of the inputs with rows that a value depends on."""
    seen, todo = {value}, [value]
    while todo:
        for read in todo.pop().all_input_nodes:
            if read not in seen and (read, 0) in placements.places:
                seen.add(read)
                todo.append(read)
    return {n.name for n in seen if n.op == "placeholder"}
