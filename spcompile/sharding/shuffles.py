"""Sorted rows whose order nobody sees: each rank may sort its own.

    ids, places = sort(experts)     rows in the order of their experts
    y = f(x[places // k], ids)      row by row, or in groups of rows with equal numbers
    out[places] = y                 in the order of the tokens again

Whatever permutation the sort gives, `out` is the same if what stands between treats all rows alike. Then a rank's rows,
sorted by the rank, give the rank's part of `out`. So the sort shares the index space of its operand, and with it all
rows in its order; and what counts places counts a rank's own.

Rows may be picked as well, as by `torch.where(mask)` in a loop over experts. Then each rank picks among its own.

`find_shuffles` follows the rows of each sort through the graph. A call that reads them otherwise than a rank could with
its own rows alone ends that: the sort is over the rows of all ranks. So does an output, and a draw of random numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads, tensor_operands
from spcompile.graph.edit import argument, is_getitem, operand, result_number, shape_of
from spcompile.graph.sizes import same
from spcompile.sharding.group_counts import CASTS, SORTS, numbers_of
from spcompile.sharding.group_ends import SPLITS, GroupEnds, all_ends, is_grouped
from spcompile.sharding.index_spaces import IndexSpaces
from spcompile.sharding.placed_rows import DIVISIONS, READERS, part_of_places
from spcompile.sharding.propagate import Placements
from spcompile.sharding.row_order import Ends, Fact, Facts, GroupRows, Ranks, RowCount, RowPlaces, Seen, SortedRows
from spcompile.sharding.rules import OpRule, rule_of, shuffled
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.creation import CONSTANT, CONSTANT_WITH_MODEL, LIKE
from spcompile.sharding.rules.rule import tensor_results

_CONSTANTS = frozenset(overloads(CONSTANT + CONSTANT_WITH_MODEL + LIKE))
_MOVES = frozenset(
    (*CASTS, *overloads("unsqueeze expand expand_as broadcast_to reshape view repeat squeeze squeeze.dim"))
)
_PICKS = frozenset(overloads("where nonzero_numpy"))
_CATS = frozenset(overloads("cat concat concatenate"))
_COMPARISONS = (operator.ge, operator.le, operator.gt, operator.lt)
_INDICES = (torch.int32, torch.int64)


@dataclass
class Shuffle:
    """One sort of which each rank may sort its own rows.

    rules: of calls that then have another rule than else. members: the calls that read or give rows in its order.
    """

    sort: fx.Node
    rules: dict[fx.Node, OpRule] = field(default_factory=dict)
    members: set[fx.Node] = field(default_factory=set)


def find_shuffles(graph: fx.Graph) -> list[Shuffle]:
    """The sorts and picks of a graph whose order nobody sees."""
    found = {node: Shuffle(node) for node in graph.nodes if _is_sort_of_rows(node) or _is_pick(node)}
    if found:
        _RowSearch(graph, found).run()
    return list(found.values())


def split_apart(shuffles: Iterable[Shuffle], spaces: IndexSpaces, placements: Placements) -> list[Shuffle]:
    """Those of which some calls would run on a rank's rows and others not, or over something else."""

    def over(node: fx.Node) -> object:
        choice = placements.choices.get(node)
        return choice and spaces.calls[node].leaves_of(choice.factor)[choice.part].find()

    return [each for each in shuffles if len({over(node) for node in each.members}) > 1]


class _RowSearch:
    """One pass over a graph. A sort whose order is seen leaves `found`."""

    def __init__(self, graph: fx.Graph, found: dict[fx.Node, Shuffle]) -> None:
        self.graph, self.found = graph, found
        self.facts: dict[fx.Node, Fact] = {}
        self.ends: dict[fx.Node, GroupEnds] = {}
        keys = [numbers_of(operand(sort, 0)) for sort in found]
        self.sort_by = {key: sort for key, sort in zip(keys, found, strict=True) if keys.count(key) == 1}

    def run(self) -> None:
        for ends in all_ends(self.graph):
            if ends.key in self.sort_by:
                self.ends.update(dict.fromkeys((*ends.calls, *ends.numbers), ends))
        for node in self.graph.nodes:
            self.visit(node)

    def visit(self, node: fx.Node) -> None:
        facts = {x: self.facts[x] for x in node.all_input_nodes if x in self.facts}
        facts = {x: fact for x, fact in facts.items() if fact.sort in self.found}
        sorts = {fact.sort for fact in facts.values()}
        if sorts:
            self.found.pop(node, None)  # a sort of what another one gave
        if node in self.found:
            sorts.add(node)
        if node in self.ends:
            sorts |= {self.sort_by[self.ends[node].key]} & self.found.keys()
        if not sorts:
            return
        try:
            if len(sorts) > 1:
                raise Seen
            (sort,) = sorts
            fact, rule = self.step(node, sort, facts)
        except Seen:
            for sort in sorts:
                del self.found[sort]
            return
        if fact is not None:
            self.facts[node] = fact
        if rule is not None:
            self.found[sort].rules[node] = rule
        if rule is not None or not (is_getitem(node) or fact is None or isinstance(fact, Ends | RowCount)):
            self.found[sort].members.add(node)

    def step(self, node: fx.Node, sort: fx.Node, facts: Facts) -> tuple[Fact | None, OpRule | None]:
        """What a call gives, and its rule where it is another than else.

        Raises:
            Seen: the call sees the order of the rows of all ranks.
        """
        if node in self.ends:
            return self.counted(node, sort, facts)
        if node is sort:
            return _start(node)
        if node.op == "call_function" and not tensor_results(node):
            return _counted_rows(node, sort, facts), None
        if is_getitem(node):
            return self.result(node, sort), None
        if is_grouped(node):
            return _rows_in_groups(node, facts), shuffled.grouped_rows(node)
        if node.target in SPLITS and any(isinstance(fact, Ends) for fact in facts.values()):
            return self.split(node, facts)
        if any(isinstance(fact, Ends) and not tensor_results(x) for x, fact in facts.items()):
            raise Seen  # something else in the size of a group
        facts = {x: fact for x, fact in facts.items() if not isinstance(fact, RowCount)}
        if not facts:
            raise Seen  # something of as many rows as were picked
        if any(isinstance(fact, GroupRows) for fact in facts.values()):
            return _rows_of_groups(node, facts)
        if all(isinstance(fact, SortedRows) for fact in facts.values()) or node.target in _CONSTANTS:
            return row_by_row(node, facts)
        if node.target in READERS:
            return READERS[node.target](node, facts)
        ((x, read), *others) = facts.items()
        if others:
            raise Seen
        if node.target in SORTS and isinstance(read, RowPlaces) and read.is_whole and _is_sort_of_rows(node):
            return Ranks(sort), shuffled.sorted_rows(node)
        if node.target in DIVISIONS and isinstance(read, RowPlaces):
            return part_of_places(node, read)
        return _moved_places(node, x, read)

    def result(self, node: fx.Node, sort: fx.Node) -> Fact | None:
        producer, number = operand(node, 0), result_number(node)
        if producer is sort and _is_pick(sort):
            return RowPlaces(sort, 0, tuple(shape_of(operand(sort, 0))), (number, number + 1), picked=True)
        if producer is sort:
            return _all_places(sort) if number else SortedRows(sort, 0)
        fact = self.facts[producer]
        if isinstance(fact, Ranks) and number == 0:
            raise Seen  # sorted places
        return replace(fact, number=number) if isinstance(fact, GroupRows) and fact.number is None else fact

    def split(self, node: fx.Node, facts: Facts) -> tuple[Fact, OpRule]:
        """Rows are split in their groups, if each size is that of one group, in their order."""
        rows, *sizes = node.all_input_nodes
        fact, ends = facts.get(rows), self.ends.get(sizes[0])
        whole = ends is not None and tuple(argument(node, 1, "split_sizes")) == ends.numbers[len(ends.numbers) // 2 :]
        if not whole or not isinstance(fact, SortedRows) or arguments(node)["dim"] != fact.dim:
            raise Seen
        if arguments(fact.sort)["descending"]:
            raise Seen
        return GroupRows(fact.sort, fact.dim, None, len(sizes)), shuffled.split_in_groups(node)

    def counted(self, node: fx.Node, sort: fx.Node, facts: Facts) -> tuple[Fact | None, OpRule | None]:
        first, *_ = self.ends[node].calls
        if node is not first:
            return Ends(sort), None
        if not all(isinstance(fact, SortedRows) for fact in facts.values()):
            raise Seen
        return Ends(sort), shuffled.own_counts(node, self.ends[node].over)


def _is_sort_of_rows(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in SORTS:
        return False
    shape = shape_of(operand(node, 0))
    return len(shape) == 1 and not same(shape[0], 1)


def _is_pick(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _PICKS and len(shape_of(operand(node, 0))) > 0


def _start(node: fx.Node) -> tuple[Fact | None, OpRule]:
    if _is_pick(node):
        return SortedRows(node, 0), shuffled.picked_places(node)
    is_argsort = len(tensor_results(node)) == 1
    return _all_places(node) if is_argsort else SortedRows(node, 0), shuffled.sorted_rows(node)


def _counted_rows(node: fx.Node, sort: fx.Node, facts: Facts) -> Fact | None:
    """A size. Of some of the rows it is another one on each rank: nothing but assertions about it may read it."""
    if node.target is torch.ops.aten.sym_size.int:
        fact, dim = facts.get(operand(node, 0)), node.args[1]
        some = (GroupRows, SortedRows, RowPlaces) if _is_pick(sort) else (GroupRows,)
        return RowCount(sort) if isinstance(fact, some) and fact.dim == dim else None
    if all(not isinstance(fact, RowCount | Ends) for fact in facts.values()) and not _is_pick(sort):
        return None
    if node.target in _COMPARISONS:
        return RowCount(sort)
    if node.target is torch.ops.aten._assert_scalar.default:
        return None
    raise Seen


def _all_places(sort: fx.Node) -> RowPlaces:
    return RowPlaces(sort, 0, tuple(shape_of(operand(sort, 0))), (0, 1))


def _rows_in_groups(node: fx.Node, facts: Facts) -> SortedRows:
    """Groups of equal numbers stand behind each other in ascending order, in all rows and in a rank's alike."""
    rows, weight, ends, *more = tensor_operands(node)
    fact = facts.get(rows)
    if not isinstance(fact, SortedRows) or fact.dim != 0 or not isinstance(facts.get(ends), Ends) or weight in facts:
        raise Seen
    if more or rule_of(node) is None or not same(shape_of(weight)[0], shape_of(ends)[0]):
        raise Seen
    if arguments(fact.sort)["descending"]:
        raise Seen
    return fact


def _rows_of_groups(node: fx.Node, facts: Facts) -> tuple[Fact, OpRule | None]:
    """Rows of one group, row by row, or of all groups, put together in their order."""
    groups = [fact for x in tensor_operands(node) if isinstance(fact := facts.get(x), GroupRows)]
    if {*facts.values()} - {*groups}:
        raise Seen
    first = groups[0]
    total = shape_of(operand(first.sort, 0))[0]
    if node.target in _CATS and [fact.number for fact in groups] == [*range(first.count)]:
        dim = arguments(node).get("dim", 0) % len(shape_of(node))
        if {fact.dim for fact in groups} != {dim} or len(tensor_operands(node)) != first.count:
            raise Seen
        return SortedRows(first.sort, dim), shuffled.groups_together(node, dim, total)
    if len({fact.number for fact in groups}) != 1:
        raise Seen
    of_all = {x: SortedRows(fact.sort, fact.dim) for x, fact in facts.items() if isinstance(fact, GroupRows)}
    found, rule = row_by_row(node, of_all, some=True)
    if found is None:
        raise Seen  # something in the shape of a group
    return replace(first, dim=found.dim), rule


def _moved_places(node: fx.Node, x: fx.Node, fact: Fact) -> tuple[Fact, OpRule | None]:
    """Places keep their numbers where they are moved or cast."""
    if node.target not in _MOVES or node.meta["val"].dtype not in _INDICES or not isinstance(fact, RowPlaces | Ranks):
        raise Seen
    dim = fact.dim if isinstance(fact, RowPlaces) else 0
    moved, rule = row_by_row(node, {x: SortedRows(fact.sort, dim)})
    if moved is None:
        raise Seen
    if isinstance(fact, RowPlaces):
        return replace(fact, dim=moved.dim), rule
    if len(shape_of(node)) != 1:
        raise Seen
    return fact, rule


def row_by_row(node: fx.Node, facts: Facts, some: bool = False) -> tuple[SortedRows | None, OpRule | None]:
    """Where the result has rows in the order of the operands' rows; None if the call reads only shapes.

    With it the call's rule, if the rows are `some` of all, as picked ones are: not as many as their dim has indices.

    Raises:
        Seen: rows are not treated alike, each by itself.
    """
    rule = rule_of(node) if node.op == "call_function" else None
    if rule is None or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise Seen
    operands = list(enumerate(zip(tensor_operands(node), rule.operands, strict=True)))
    read = [(facts.get(x), x, dims) for number, (x, dims) in operands if number not in rule.unread]
    in_order = [(fact, dims) for fact, _, dims in read if fact is not None]
    sorts = {fact.sort for fact in facts.values()}
    some = some or any(map(_is_pick, sorts))
    if not in_order and some:
        raise Seen  # as many rows as were picked, which no operand has
    if not in_order:
        return None, None
    if not all(isinstance(fact, SortedRows) and len(dims[fact.dim]) == 1 for fact, dims in in_order):
        raise Seen  # rows in groups of so many
    name, *others = {dims[fact.dim][0] for fact, dims in in_order if isinstance(fact, SortedRows)}
    if others or name in rule.replicated or name in rule.paired or name in rule.prefix_of.values():
        raise Seen
    for fact, x, dims in read:
        if fact is None and x.target not in _CONSTANTS and any(name in dim for dim in dims):
            raise Seen  # rows in another order
    found = {tuple(d for d, dim in enumerate(dims) if name in dim) for dims in rule.results}
    if len(found) != 1 or len(at := next(iter(found))) != 1 or any(dims[at[0]] != (name,) for dims in rule.results):
        raise Seen  # a sum over rows, or rows beside something else in one dim
    (sort,) = sorts
    if not some:
        return SortedRows(sort, at[0]), None
    total = math.prod(shape_of(operand(sort, 0)))
    return SortedRows(sort, at[0]), shuffled.of_picked_rows(rule, name, total)
