"""Which index spaces axis `tp` splits: decided from the graph, without a plan and without names.

A weight matrix is contracted over one of its dims and keeps the other. Splitting a space that is kept by one product
and contracted by a later one needs no communication in between: that is Megatron's column-parallel and row-parallel
pair (Shoeybi et al. 2019). Three kinds of spaces are taken, in this order:

    heads        the key/value groups of every attention, or the query heads of a group where those are too few
    hidden       a space that some product contracts, if nothing but products sums over it for each row and nobody
                 makes it or needs it whole; those that cost the least communication per weight first
    vocabulary   the free space of a product that is wider than what it contracts, and the rows of a lookup table

The residual stream is never taken: norms sum over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.edit import is_getitem, operand
from spcompile.graph.sizes import hint, numel_hint
from spcompile.sharding.index_spaces import IndexSpaces, OpSpaces
from spcompile.sharding.mixed_rows import all_sequences
from spcompile.sharding.propagate import Choice, Placements, leaves_sums, place_of, propagate
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.sharded_or_replicated import estimated_bytes
from spcompile.sharding.spaces import Space, leaves


@dataclass
class TensorSeeds:
    """What was decided.

    seeds: calls and the factor over which each runs split; everything else follows by propagation.
    kept: products whose weight every rank holds whole.
    sequences: what ranks have rows of between the regions that are split.
    """

    seeds: dict[fx.Node, Choice] = field(default_factory=dict)
    kept: list[fx.Node] = field(default_factory=list)
    sequences: set[Space] = field(default_factory=set)


def tensor_seeds(graph: fx.Graph, spaces: IndexSpaces, degree: int) -> TensorSeeds:
    """The seeds of axis `tp` of `degree` ranks."""
    search = _SeedSearch(graph, spaces, degree)
    for node, call in spaces.calls.items():
        choice = _split_heads(call, degree) if call.rule.paired else None
        if choice is not None:
            search.take(node, choice, propagate(spaces, {node: choice}))
    search.take_cheapest(search.contracted(), may_gather=False)
    search.take_cheapest(search.widening(), may_gather=True)
    search.take_cheapest(search.lookups(), may_gather=True)
    kept = [node for node in spaces.calls if node not in search.calls and search.weight_of(node) is not None]
    return TensorSeeds(search.seeds, kept, search.sequences)


def split_heads(groups: int, per_group: int, degree: int) -> str:
    """Which factor of the query heads tp splits: "g", the groups that share a key/value head, or "r", heads of a group.

    Groups if they divide evenly, else heads of a group, else whichever are enough; the rest is padding.
    """
    sizes = {"g": groups, "r": per_group}
    even = [name for name, size in sizes.items() if size > 1 and size % degree == 0]
    enough = [name for name, size in sizes.items() if size >= degree]
    return (even or enough or sorted(sizes, key=lambda name: -sizes[name]))[0]


def heads_on_a_rank(heads: int, groups: int, degree: int) -> tuple[int, int]:
    """(query heads, key/value heads) of one rank of tp, padding included."""
    per_group = heads // groups
    if degree == 1 or heads == 1:
        return heads, groups
    if split_heads(groups, per_group, degree) == "g":
        return -(-groups // degree) * per_group, -(-groups // degree)
    return groups * -(-per_group // degree), groups


def _split_heads(call: OpSpaces, degree: int) -> Choice | None:
    groups, per_group = (hint(call.rule.sizes.get(name, 1)) for name in ("g", "r"))
    if groups * per_group == 1:
        return None
    factor = split_heads(groups, per_group, degree)
    return Choice(factor) if len(call.leaves_of(factor)) == 1 else None


def _made_of_nothing(graph: fx.Graph) -> set[fx.Node]:
    """Values that depend on no input: constants, and what is drawn."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and all(read in found for read in node.all_input_nodes):
            found.add(node)
    return found


def _contracted(call: OpSpaces) -> set[str]:
    """The factors that a call sums over, also inside of it."""
    return set(call.rule.reductions) | call.rule.contracted


@dataclass
class _Candidate:
    node: fx.Node
    choice: Choice
    space: Space


class _SeedSearch:
    """Takes one region of calls after the other; regions never overlap."""

    def __init__(self, graph: fx.Graph, spaces: IndexSpaces, degree: int) -> None:
        self.graph, self.spaces, self.degree = graph, spaces, degree
        self.seeds: dict[fx.Node, Choice] = {}
        self.calls: set[fx.Node] = set()
        self.values: set[tuple[fx.Node, int]] = set()
        self.sequences = all_sequences(graph, spaces)
        self.weights = self._weights()
        self.made_here = _made_of_nothing(graph)

    def take(self, node: fx.Node, choice: Choice, region: Placements) -> None:
        """Take a region, unless a part of it is taken."""
        if self.calls.isdisjoint(region.choices) and self.values.isdisjoint(region.places):
            self.seeds[node] = choice
            self.calls.update(region.choices)
            self.values.update(region.places)

    def take_cheapest(self, candidates: Iterator[_Candidate], *, may_gather: bool) -> None:
        """Take what fits, the least bytes of communication per weight first; each space is tried once."""
        tried: set[Space] = set()
        fitting: list[tuple[float, int, _Candidate, Placements]] = []
        for candidate in candidates:
            space = candidate.space.find()
            if space in tried or hint(space.size) < self.degree or space.family() in self.sequences:
                continue
            tried.add(space)
            region = propagate(self.spaces, {candidate.node: candidate.choice})
            if self._fits(region, may_gather):
                fitting.append((self._cost(region), len(fitting), candidate, region))
        for _, _, candidate, region in sorted(fitting, key=lambda entry: entry[:2]):
            self.take(candidate.node, candidate.choice, region)

    def contracted(self) -> Iterator[_Candidate]:
        """The spaces that products with a weight sum over."""
        for node, call in self.spaces.calls.items():
            if node not in self.calls and self.weight_of(node) is not None:
                for factor in call.rule.reductions:
                    for part, space in enumerate(call.leaves_of(factor)):
                        yield _Candidate(node, Choice(factor, part), space)

    def widening(self) -> Iterator[_Candidate]:
        """The free spaces of weights that are longer than what is summed over."""
        for node, call in self.spaces.calls.items():
            weight = self.weight_of(node) if node not in self.calls else None
            if weight is None:
                continue
            contracted = _contracted(call)
            summed = max(hint(call.rule.sizes[factor]) for factor in contracted)
            free = {f for dim in self._dims_of(node, weight) for f in dim} - contracted
            for factor in sorted(free - call.rule.replicated):
                for part, space in enumerate(call.leaves_of(factor)):
                    if hint(space.find().size) > summed:
                        yield _Candidate(node, Choice(factor, part), space)

    def lookups(self) -> Iterator[_Candidate]:
        """The rows of tables that the user's integers look up, if there are more of them than columns."""
        from_user = self._from_user()
        for node, call in self.spaces.calls.items():
            operands = tensor_operands(node)
            if node in self.calls or not call.rule.reductions or len(operands) != 2 or operands[0] not in self.weights:
                continue
            if operands[0].meta["val"].ndim < 2:
                continue  # numbers for the user's integers, or mixed with activations, are no table
            rows, columns = (hint(size) for size in operands[0].meta["val"].shape[:2])
            if operands[1] in from_user and rows > columns:
                for factor in call.rule.reductions:
                    yield _Candidate(node, Choice(factor), call.leaves_of(factor)[0])

    def weight_of(self, node: fx.Node) -> fx.Node | None:
        """The weight that a product contracts with an activation."""
        call = self.spaces.calls[node]
        operands = tensor_operands(node)
        floating = [x for x in operands if x.meta["val"].is_floating_point()]
        weights = [x for x in floating if x in self.weights and x.meta["val"].ndim >= 2]
        summed = _contracted(call)
        if not summed or len(weights) != 1 or len(floating) < 2 or all(x in self.weights for x in floating):
            return None
        return weights[0] if any(summed & set(dim) for dim in self._dims_of(node, weights[0])) else None

    def _dims_of(self, node: fx.Node, operand: fx.Node) -> tuple[tuple[str, ...], ...]:
        return self.spaces.calls[node].rule.operands[tensor_operands(node).index(operand)]

    def _weights(self) -> set[fx.Node]:
        """Floating values that are made of inputs without a sequence only, and of the model's own state.

        State that is as long as the sequence of the user's inputs is made of positions, and is a weight.
        """
        found: set[fx.Node] = set()
        given = [n for n in self.graph.find_nodes(op="placeholder") if not n.meta.get("state")]
        has_positions = any(self._is_of_rows(node) for node in given if tensor_results(node))
        for node in self.graph.nodes:
            results = tensor_results(node)
            if node.op == "output" or not results or not results[0].is_floating_point():
                continue
            if node.op == "placeholder":
                is_weight = (has_positions and bool(node.meta.get("state"))) or not self._is_of_rows(node)
            else:
                read = tensor_operands(node)
                is_weight = bool(read) and all(x in found for x in read)
            if is_weight:
                found.add(node)
        return found

    def _is_of_rows(self, node: fx.Node) -> bool:
        spaces = leaves(space for dim in self.spaces.values[node][0] for space in dim)
        return any(space.family() in self.sequences for space in spaces)

    def _from_user(self) -> set[fx.Node]:
        """Values that depend on integers which are no part of the model's own state."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if node.op == "placeholder":
                is_user = tensor_results(node) != [] and not val.is_floating_point() and not node.meta.get("state")
            else:
                is_user = any(x in found for x in node.all_input_nodes)
            if is_user:
                found.add(node)
        return found

    def _fits(self, region: Placements, may_gather: bool) -> bool:
        """Whether only products with weights sum over the space, and whether nobody makes it or needs it whole.

        Other sums may give a few numbers for all rows of a sequence, as the mean norm of the channels of an image.

        A value that is made whole is split along the sequence behind its norm: to split its features instead, it would
        have to be gathered first. What is made of no input, as a mask of dropout, every rank has whole anyway.
        """
        for node, choice in region.choices.items():
            call = self.spaces.calls[node]
            sums = leaves_sums(call, choice) or choice.factor in call.rule.filled
            if sums and not self._sums_with_weight(node, call, choice) and self._has_rows(node):
                return False
        if may_gather:
            return True
        for value, _ in region.places:
            if value in self.weights or value in self.made_here:
                continue
            if (operand(value, 0) if is_getitem(value) else value) not in region.choices:
                return False
            for user in value.users:
                reads = not is_getitem(user) and user.op != "output"
                if reads and user not in region.choices:
                    return False
        return True

    def _has_rows(self, node: fx.Node) -> bool:
        """Whether a call gives something for each row of a sequence, not a few numbers for all of them."""
        found = (space.family() for dims in self.spaces.values[node] for dim in dims for space in leaves(dim))
        return not self.sequences or not self.sequences.isdisjoint(found)

    def _sums_with_weight(self, node: fx.Node, call: OpSpaces, choice: Choice) -> bool:
        operands = zip(tensor_operands(node), call.rule.operands, strict=True)
        return any(x in self.weights and place_of(dims, call, choice) is not None for x, dims in operands)

    def _cost(self, region: Placements) -> float:
        """Bytes that sums move, forward and for the gradients of operands all ranks read, per element of weight."""
        moved, weight = 0.0, 1.0
        read_whole: set[fx.Node] = set()
        for node, choice in region.choices.items():
            call = self.spaces.calls[node]
            if leaves_sums(call, choice):
                moved += estimated_bytes(node)
            for x, dims in zip(tensor_operands(node), call.rule.operands, strict=True):
                split = place_of(dims, call, choice) is not None
                if x in self.weights:
                    weight += numel_hint(x.meta["val"]) if split and node not in self.weights else 0
                elif not split and x.meta["val"].is_floating_point():
                    read_whole.add(x)
        return (moved + sum(map(estimated_bytes, read_whole))) / weight
