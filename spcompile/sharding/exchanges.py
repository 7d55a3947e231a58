"""Where an op wants the sequence whole, another dim is split in its place: all-to-alls there and back.

A transform along the sequence is independent for every channel, a recurrence for every head, a product with a matrix
[S, S] for every feature. Such a call need not gather: its operands go from S(sequence) to S(channels), the call and
what stands around it run on a rank's channels, and the result goes back. Ulysses is this for attention (Jacobs et al.
2023). Which calls go along, such as all the steps of a loop over time, is a minimum cut over estimated bytes between
"as propagation found it" and "over the other dim". Entries of the batch never take the sequence's place: whether there
are enough of them differs from call to call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.edit import is_getitem, operand
from spcompile.graph.reshard import Place
from spcompile.graph.sizes import hint
from spcompile.sharding.index_spaces import IndexSpaces, OpSpaces
from spcompile.sharding.propagate import Choice, Placements, is_prefix, leaves_sums, place_of, propagate
from spcompile.sharding.rules.rule import Dims, OpRule
from spcompile.sharding.sharded_or_replicated import WIRE, estimated_bytes, trained_values
from spcompile.sharding.spaces import Space, leaves

WORK = 8.0  # a byte that every rank computes and saves against one byte of memory traffic
CUT = 4 * WORK  # the same of a byte behind which the split dim is a product of dims: attention then gathers its keys


@dataclass(frozen=True)
class Exchange:
    """`node` mixes what the axis splits: it and its surroundings run over another factor, of `size` indices.

    mixing: the calls that do not run over what is split, or cut and join it, with the factor over which they now run.
    """

    node: fx.Node
    size: int
    mixing: Mapping[fx.Node, Choice]


def exchange(
    graph: fx.Graph, spaces: IndexSpaces, placements: Placements, degree: int, fixed: Collection[fx.Node] = ()
) -> list[Exchange]:
    """Let calls that want a split dim whole run over another one, but not those that are `fixed`.

    Changes `placements`.
    """
    found = []
    search = _ExchangeSearch(graph, spaces, placements, degree, fixed)
    for node in graph.nodes:
        moved = search.best(node) if search.wants_whole(node) else None
        if moved is not None:
            mixing = {n: moved.other.choices[n] for n in graph.nodes if n in moved.calls and search.mixes(n)}
            found.append(Exchange(node, hint(moved.space.find().size), mixing))
            search.take(moved)
    return found


def alone_in_exchanges(graph: fx.Graph, found: Iterable[Exchange], spaces: IndexSpaces) -> dict[fx.Node, OpRule]:
    """Rules that tie nothing but the other factor and entries to other calls, for the calls of exchanges that mix.

    They have the sequence whole, and may cut and join it as they like, as the halves of a scan do: that must not cut
    it for the rest of the graph, where ranks split it.
    """
    entries = entries_of_inputs(graph, spaces)
    rules: dict[fx.Node, OpRule] = {}
    for node, choice in (at for each in found for at in each.mixing.items()):
        call = spaces.calls[node]
        of_entries = {f for f in call.rule.sizes if call.leaves_of(f) and entries.issuperset(call.leaves_of(f))}
        rules[node] = _isolated(call.rule, {choice.factor, *of_entries})
    return rules


def _isolated(rule: OpRule, kept: set[str]) -> OpRule:
    """The rule with a whole factor of its own in place of all but these, one between each two borders of dims."""
    sizes = {factor: rule.sizes[factor] for factor in kept}

    def joined(dim: tuple[str, ...], prefix: str) -> tuple[str, ...]:
        """All that stands on one side of a factor that is kept is one."""
        names: list[str] = []
        for name in dim:
            if name in kept:
                names.append(name)
                continue
            if not names or names[-1] in kept:
                names.append(f"{prefix}.{len(names)}")
            sizes[names[-1]] = sizes.get(names[-1], 1) * rule.sizes[name]
        return tuple(names)

    def of(tensors: Sequence[Dims], prefix: str) -> tuple[Dims, ...]:
        return tuple(
            tuple(joined(dim, f"{prefix}{tensor}.{place}") for place, dim in enumerate(dims))
            for tensor, dims in enumerate(tensors)
        )

    operands, results = of(rule.operands, "x"), of(rule.results, "y")
    whole = frozenset(sizes) - (kept - rule.replicated)
    return OpRule(operands, results, sizes, replicated=whole, local=rule.local, unread=rule.unread)


@dataclass
class _Region:
    """The calls that could run over one other space, and those of them that shall."""

    space: Space
    other: Placements
    calls: set[fx.Node] = field(default_factory=set)


class _ExchangeSearch:
    def __init__(
        self,
        graph: fx.Graph,
        spaces: IndexSpaces,
        placements: Placements,
        degree: int,
        fixed: Collection[fx.Node],
    ) -> None:
        self.graph, self.spaces, self.placements, self.degree = graph, spaces, placements, degree
        self.fixed = frozenset(fixed).union(_calls_of_unknown_size(spaces))
        self.trained = trained_values(graph)
        self.entries = entries_of_inputs(graph, spaces)

    def wants_whole(self, node: fx.Node) -> bool:
        """Whether a call on the path of a gradient reads whole what ranks have in parts, and gives something large."""
        if node not in self.trained or node not in self.spaces.calls or node in self.fixed:
            return False
        read = [x for x in tensor_operands(node) if x in self.trained and self._is_split(x)]
        choice, call = self.placements.choices.get(node), self.spaces.calls[node]
        if not read or choice is None:
            return bool(read)
        largest = max(map(estimated_bytes, read))
        if choice.factor in call.rule.moved:
            return any(_is_read_bit_by_bit(x, self.degree) for x in read if not self._is_split(node))
        return leaves_sums(call, choice) and self.degree * estimated_bytes(node) > largest

    def mixes(self, node: fx.Node) -> bool:
        """Whether a call does not run over what is split element by element."""
        rule, choice = self.spaces.calls[node].rule, self.placements.choices.get(node)
        is_reshape = any(len(dim) > 1 for dims in (*rule.operands, *rule.results) for dim in dims)
        return choice is None or choice.factor in rule.moved or is_reshape

    def cuts(self, node: fx.Node) -> bool:
        """Whether a call joins what is split with other dims, or parts it, so that it is a product of dims."""
        call, choice = self.spaces.calls[node], self.placements.choices.get(node)
        dims = (dim for dims in (*call.rule.operands, *call.rule.results) for dim in dims)
        joined = {factor for dim in dims if choice is not None and choice.factor in dim for factor in dim}
        return any(
            self.entries.isdisjoint(call.leaves_of(f)) for f in joined if choice is not None and f != choice.factor
        )

    def best(self, node: fx.Node) -> _Region | None:
        """What to run over which other space, so that `node` need not gather; None if nothing is won."""
        saved, best = 0.0, None
        for choice, space in self._choices(node):
            region = _Region(space, propagate(self.spaces, {node: choice}, may=self._may))
            won = _Cut(self, region, node).run()
            if won > saved:
                saved, best = won, region
        return best

    def take(self, region: _Region) -> None:
        """Place what runs over the other space there."""
        region.space.find().takes_turns = True
        for node in region.calls:
            call, choice = self.spaces.calls[node], region.other.choices[node]
            self.placements.choices[node] = choice
            for number, dims in enumerate(call.rule.results):
                self.placements.places.pop((node, number), None)
                place = place_of(dims, call, choice)
                if place is not None:
                    self.placements.places[(node, number)] = place
                    self.placements.origins[(node, number)] = region.other.origins.get((node, number))
        for node in self.graph.nodes:
            source = operand(node, 0) if is_getitem(node) else None
            if source in region.calls and (place := region.other.places.get((node, 0))) is not None:
                self.placements.places[(node, 0)] = place

    def place(self, value: fx.Node, placements: Placements) -> Place | None:
        """Where a value is split, if the call that makes it is."""
        producer = operand(value, 0) if is_getitem(value) else value
        return placements.places.get((value, 0)) if producer in placements.choices else None

    def _is_split(self, value: fx.Node) -> bool:
        return self.place(value, self.placements) is not None

    def _choices(self, node: fx.Node) -> Iterator[tuple[Choice, Space]]:
        call = self.spaces.calls[node]
        taken = {self._space_at(x) for x in tensor_operands(node) if self._is_split(x)}
        for factor in call.rule.sizes:
            for part, space in enumerate(call.leaves_of(factor)):
                is_large = hint(space.find().size) >= self.degree
                if is_large and space.find() not in taken | self.entries and self._may(node, Choice(factor, part)):
                    yield Choice(factor, part), space

    def _space_at(self, value: fx.Node) -> Space:
        place = self.place(value, self.placements)
        assert place is not None
        return self.spaces.dims(value)[place.dim][place.part].find()

    def _may(self, node: fx.Node, choice: Choice) -> bool:
        """Whether a call may run over another factor: each part of its result is made of the same part of operands."""
        call = self.spaces.calls[node]
        rule = call.rule
        in_results = node not in self.fixed and any(choice.factor in dim for dims in rule.results for dim in dims)
        bound = rule.replicated.union(rule.moved, rule.prefix_of, rule.completed)
        return in_results and not rule.paired and choice.factor not in bound and not is_prefix(call, choice)


def entries_of_inputs(graph: fx.Graph, spaces: IndexSpaces) -> set[Space]:
    """The spaces that stand first in what callers pass in, before other dims, and that no product sums over."""
    found: set[Space] = set()
    for node in graph.find_nodes(op="placeholder"):
        if node in spaces.values and not node.meta.get("state") and len(spaces.dims(node)) > 1:
            found.update(leaves(spaces.dims(node)[0])[:1])
    for call in spaces.calls.values():
        if len(call.rule.operands) > 1 and any(call.rule.results):  # no loss
            for factor in {*call.rule.reductions, *call.rule.contracted}:
                found.difference_update(call.leaves_of(factor))
    return found


def _calls_of_unknown_size(spaces: IndexSpaces) -> Iterator[fx.Node]:
    """The calls with a dim whose size depends on data, such as rows that are picked: no rank knows those of others."""
    for node, call in spaces.calls.items():
        if any(free_unbacked_symbols(size) for size in call.rule.sizes.values() if not isinstance(size, int)):
            yield node


def _is_read_bit_by_bit(value: fx.Node, degree: int) -> bool:
    """Whether many calls each take a part of a value that is shorter than what a rank has, and most of it together."""
    parts = [estimated_bytes(user) for user in value.users]
    short = [size for size in parts if degree * size < estimated_bytes(value)]
    return 2 * sum(short) >= estimated_bytes(value)


class _Cut:
    """The minimum cut of one region: what stays as propagation found it, and what runs over the other space."""

    def __init__(self, search: _ExchangeSearch, region: _Region, pinned: fx.Node) -> None:
        self.search, self.region, self.pinned = search, region, pinned
        size = hint(region.space.find().size)
        self.waste = -(-size // search.degree) * search.degree / size
        self.stay: dict[fx.Node, float] = dict.fromkeys(region.other.choices, 0.0)
        self.go: dict[fx.Node, float] = dict.fromkeys(region.other.choices, 0.0)
        self.between: dict[tuple[fx.Node, fx.Node], float] = {}

    def run(self) -> float:
        """Fills the region's `calls`; returns by how much they cost less than they did."""
        for node in self.stay:
            self.stay[node] += self._work(node, self.search.placements, 1.0)
            self.stay[node] += CUT * estimated_bytes(node) if self.search.cuts(node) else 0.0
            self.go[node] += self._work(node, self.region.other, self.waste)
        for value, user in self._uses():
            self._add_use(value, user)
        network = nx.DiGraph()
        for node in self.stay:
            network.add_edge("stay", node, capacity=self.go[node])
            network.add_edge(node, "go", capacity=self.stay[node])
        network.add_edge(self.pinned, "go", capacity=float("inf"))
        for (producer, user), cost in self.between.items():
            network.add_edge(producer, user, capacity=cost)
        cost, (_, going) = nx.minimum_cut(network, "stay", "go")
        self.region.calls = {node for node in self.stay if node in going}
        return sum(self.stay.values()) - cost

    def _uses(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(value, user) with at least one of them in the region."""
        calls = self.region.other.choices
        for user in self.search.graph.nodes:
            if user.op == "output" or is_getitem(user):
                continue
            for value in dict.fromkeys(tensor_operands(user)):
                if user in calls or _producer(value) in calls:
                    yield value, user

    def _add_use(self, value: fx.Node, user: fx.Node) -> None:
        producer = _producer(value)
        now, then = self.search.placements, self.region.other
        costs = [[self._cost(value, user, p, u) for u in (now, then)] for p in (now, then)]
        if producer not in self.stay:
            self.stay[user] += costs[0][0]
            self.go[user] += costs[0][1]
        elif user not in self.stay:
            self.stay[producer] += costs[0][0]
            self.go[producer] += costs[1][0]
        else:
            (both_stay, user_goes), (producer_goes, both_go) = costs
            self.stay[producer] += both_stay
            self.go[producer] += producer_goes
            self.go[user] += max(0.0, both_go - producer_goes)
            self.stay[user] += max(0.0, producer_goes - both_go)
            extra = max(0.0, user_goes + producer_goes - both_stay - both_go)
            self.between[producer, user] = self.between.get((producer, user), 0.0) + extra

    def _cost(self, value: fx.Node, user: fx.Node, made: Placements, read: Placements) -> float:
        """Of what a value is to what its user wants, on the wire, forward and backward."""
        has = self.search.place(value, made)
        wanted = _wanted(self.search.spaces.calls.get(user), read.choices.get(user), value, user)
        is_trained = value in self.search.trained
        each = WIRE * estimated_bytes(value)
        if has == wanted or wanted == "any":
            return 0.0
        if has is None:
            return each if is_trained else 0.0
        return (2 * each if is_trained else each) / (1 if wanted is None else self.search.degree)

    def _work(self, node: fx.Node, placements: Placements, waste: float) -> float:
        call, choice = self.search.spaces.calls[node], placements.choices.get(node)
        size = estimated_bytes(node) * (WORK if node in self.search.trained else 1.0)
        if choice is None:
            return size
        split = [place_of(dims, call, choice) for dims in call.rule.results]
        return size * waste / self.search.degree if any(split) else size + 2 * WIRE * estimated_bytes(node)


def _producer(value: fx.Node) -> fx.Node:
    return operand(value, 0) if is_getitem(value) else value


def _wanted(call: OpSpaces | None, choice: Choice | None, value: fx.Node, user: fx.Node) -> Place | str | None:
    """Where a user wants a value to be split: None for whole, "any" where only its shape matters."""
    if call is None:
        return None
    for number, (read, dims) in enumerate(zip(tensor_operands(user), call.rule.operands, strict=True)):
        if read is value:
            return "any" if number in call.rule.unread else place_of(dims, call, choice) if choice is not None else None
    return None
