"""The sequence of a model without attention: rows that weights treat alike, and that something else mixes.

A projection treats all rows of its input alike: positions, and entries of the batch. Entries never meet. So a space of
rows that some other call sums over, transforms or walks through is a sequence: tokens of a Fourier or MLP mixer,
steps of a recurrence, rows of an image. Where a model mixes several such spaces, as tokens and channels, the one is
taken over which more of it runs split. It need not be the largest: the rest is exchanged (`exchanges.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.sizes import hint
from spcompile.sharding.exchanges import entries_of_inputs
from spcompile.sharding.index_spaces import IndexSpaces, OpSpaces
from spcompile.sharding.propagate import Choice, place_of, propagate
from spcompile.sharding.sequences import sequence_families
from spcompile.sharding.sharded_or_replicated import estimated_bytes, trained_values
from spcompile.sharding.spaces import Space


def all_sequences(graph: fx.Graph, spaces: IndexSpaces) -> set[Space]:
    """The families of the sequences of a graph, with attention or without."""
    found = sequence_families(spaces.calls)
    seeds = {} if found else mixed_row_seeds(graph, spaces)
    return found | {spaces.calls[node].leaves_of(at.factor)[at.part].family() for node, at in seeds.items()}


def mixed_row_seeds(graph: fx.Graph, spaces: IndexSpaces) -> dict[fx.Node, Choice]:
    """One product over the rows of each sequence; nothing where no rows are mixed."""
    trained = trained_values(graph)
    mixed = _mixed_spaces(spaces, trained)
    rows = {space: at for space, at in _rows_of_products(graph, spaces).items() if space in mixed}
    entries = entries_of_inputs(graph, spaces)
    candidates = {s: at for s, at in rows.items() if s not in entries and hint(s.size) > 1}
    seeds: dict[fx.Node, Choice] = {}
    taken: set[fx.Node] = set()
    while candidates:
        regions = {space: propagate(spaces, dict([at])) for space, at in candidates.items()}
        split = {s: {n for n in r.choices if n in trained and (n, 0) in r.places} for s, r in regions.items()}
        best = max(candidates, key=lambda space: sum(map(estimated_bytes, split[space] - taken)))
        node, choice = candidates.pop(best)
        seeds[node] = choice
        taken |= regions[best].choices.keys()
        candidates = {space: at for space, at in candidates.items() if split[space].isdisjoint(taken)}
    return seeds


def _rows_of_products(graph: fx.Graph, spaces: IndexSpaces) -> dict[Space, tuple[fx.Node, Choice]]:
    """The first product with a weight for each space of rows: in its other operand and its result alone."""
    state = _made_of_state(graph)
    found: dict[Space, tuple[fx.Node, Choice]] = {}
    for node, call in spaces.calls.items():
        read = tensor_operands(node)
        weights = [dims for x, dims in zip(read, call.rule.operands, strict=True) if x in state and len(dims) > 1]
        others = [dims for x, dims in zip(read, call.rule.operands, strict=True) if x not in state]
        if not (call.rule.reductions or call.rule.contracted) or len(weights) != 1 or len(others) != 1:
            continue
        in_weight = {factor for dim in weights[0] for factor in dim}
        for factor in (factor for dim in others[0] for factor in dim if factor not in in_weight):
            for part, space in enumerate(call.leaves_of(factor)):
                choice = Choice(factor, part)
                if factor not in call.rule.replicated and place_of(call.rule.results[0], call, choice) is not None:
                    found.setdefault(space.find(), (node, choice))
    return found


def _made_of_state(graph: fx.Graph) -> set[fx.Node]:
    """Values made of parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            is_state = bool(node.meta.get("state"))
        else:
            is_state = node.op == "call_function" and all(x in found for x in node.all_input_nodes)
        if is_state:
            found.add(node)
    return found


def _mixed_spaces(spaces: IndexSpaces, trained: set[fx.Node]) -> set[Space]:
    """The spaces that calls on the path of a gradient need whole, or sum over with large results, or in products.

    A product of keys with values, summed over the rows of both, is how linear attention mixes them.
    """
    return {
        space.find() for node, call in spaces.calls.items() if node in trained for space in _mixed(node, call, trained)
    }


def _mixed(node: fx.Node, call: OpSpaces, trained: set[fx.Node]) -> Iterator[Space]:
    operands = zip(tensor_operands(node), call.rule.operands, strict=True)
    read = [(x, dims) for i, (x, dims) in enumerate(operands) if x in trained and i not in call.rule.unread]
    in_results = {factor for dims in call.rule.results for dim in dims for factor in dim}
    for x, dims in read:
        for factor in (factor for dim in dims for factor in dim):
            of_products = sum(any(factor in dim for dim in others) for _, others in read) > 1
            is_large = 2 * estimated_bytes(node) > estimated_bytes(x)
            is_summed = factor in call.rule.reductions and (is_large or of_products)
            is_mixed = factor in call.rule.replicated.union(call.rule.summed_up)
            if is_mixed or is_summed or (factor in call.rule.moved and factor not in in_results):
                yield from call.leaves_of(factor)
