"""The propagation engine: from the attention's query rows to a placement of every value, in both directions.

A call that runs sharded has chosen one of its factors; the choice fixes how its operands and results are split. The
engine starts at the seeds, walks along values to producers and consumers, and lets each call choose the factor that
meets the placement it was reached with. It never reads an op's name, only its rule, and keeps for every value the
chain of who placed it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.edit import is_getitem, operand, result_number
from spcompile.graph.reshard import Place
from spcompile.sharding.index_spaces import IndexSpaces, OpSpaces
from spcompile.sharding.spaces import Space, leaves


@dataclass(frozen=True)
class Choice:
    """A call runs sharded over factor `factor` of its rule, at its finest part number `part`."""

    factor: str
    part: int = 0


@dataclass
class Placements:
    """What propagation found for one mesh axis.

    choices: the calls that can run sharded, and over which factor.
    places: the values that can be split, and where: {(node, result number): Place}.
    origins: the value from which a placement came, back to a seed: {(node, result): (node, result) or None}.
    forced: calls that may not run replicated where they can run sharded, since others rely on it.
    """

    choices: dict[fx.Node, Choice] = field(default_factory=dict)
    places: dict[tuple[fx.Node, int], Place] = field(default_factory=dict)
    origins: dict[tuple[fx.Node, int], tuple[fx.Node, int] | None] = field(default_factory=dict)
    forced: set[fx.Node] = field(default_factory=set)

    def origin(self, node: fx.Node, result: int = 0) -> list[fx.Node]:
        """The chain of nodes that led to this value's placement, the seed last."""
        chain: list[fx.Node] = []
        at: tuple[fx.Node, int] | None = (node, result)
        while at is not None and len(chain) < 10_000:
            chain.append(at[0])
            at = self.origins.get(at)
        return chain


def place_of(dims: tuple[tuple[str, ...], ...], call: OpSpaces, choice: Choice) -> Place | None:
    """Where an operand or result with these rule dims holds the chosen factor (or one that follows it)."""
    names = {choice.factor, call.rule.paired.get(choice.factor)}
    names.update(prefix for prefix, whole in call.rule.prefix_of.items() if whole == choice.factor)
    names.update(call.rule.moved if choice.factor in call.rule.moved else ())
    names.update([call.rule.windows[choice.factor].of] if choice.factor in call.rule.windows else ())
    for index, dim in enumerate(dims):
        offset = 0
        for factor in dim:
            if factor in names:
                return Place(index, offset + choice.part)
            offset += len(call.leaves_of(factor))
    return None


def choice_at(dims: tuple[tuple[str, ...], ...], call: OpSpaces, place: Place) -> Choice | None:
    """The choice under which an operand or result with these rule dims is split at `place`; None if not shardable."""
    offset = 0
    for factor in dims[place.dim]:
        count = len(call.leaves_of(factor))
        if place.part < offset + count:
            return _shardable(call, Choice(factor, place.part - offset))
        offset += count
    return None


def _shardable(call: OpSpaces, choice: Choice) -> Choice | None:
    rule = call.rule
    for leader, follower in rule.paired.items():
        if choice.factor == follower and follower not in rule.completed:
            choice = Choice(leader, choice.part)
    if choice.factor in rule.moved:  # each of them is split over its first part, whatever parts the others have
        return Choice(rule.moved[0]) if choice.part == 0 else None
    for (
        made,
        window,
    ) in rule.windows.items():  # split over its first part, whatever parts it and what it is made of have
        if choice.factor in (made, window.of):
            return Choice(made) if choice.part == 0 else None
    if is_prefix(call, choice):
        parts = [call.leaves_of(factor) for factor in (choice.factor, *_prefixes(call, choice.factor))]
        return choice if all(len(spaces) == 1 for spaces in parts) else None  # else it is no beginning of any part
    if choice.factor in rule.replicated or choice.factor in rule.prefix_of:
        return None
    in_results = any(choice.factor in dim for result in rule.results for dim in result)
    return choice if in_results or choice.factor in rule.reductions or choice.factor in rule.completed else None


def _prefixes(call: OpSpaces, factor: str) -> list[str]:
    return [prefix for prefix, whole in call.rule.prefix_of.items() if whole == factor]


def is_prefix(call: OpSpaces, choice: Choice) -> bool:
    """Whether the call takes the beginning of the sharded dim: on shards it is the identity with a shorter length."""
    return choice.factor in call.rule.prefix_of.values()


def shards_results(call: OpSpaces, choice: Choice) -> bool:
    """Whether the results are split."""
    return any(place_of(dims, call, choice) for dims in call.rule.results)


def leaves_sums(call: OpSpaces, choice: Choice) -> bool:
    """Whether the results are partial sums."""
    return not shards_results(call, choice) and choice.factor not in call.rule.completed.union(call.rule.moved)


def propagate(
    spaces: IndexSpaces,
    seeds: Mapping[fx.Node, Choice],
    inputs: Mapping[fx.Node, Place] | None = None,
    may: Callable[[fx.Node, Choice], bool] | None = None,
) -> Placements:
    """Spread the seeds' choices, and where inputs are split, over the graph to a fixed point.

    Breadth first, so nearer seeds win. may: whether a call may make this choice; without it, any.
    """
    found = Placements()
    queue: deque[tuple[fx.Node, int]] = deque()

    def reach(value: tuple[fx.Node, int], place: Place, source: tuple[fx.Node, int] | None) -> None:
        if value not in found.places and _may_be_at(value, place, spaces, found):
            found.places[value], found.origins[value] = place, source
            queue.append(value)

    def put(node: fx.Node, number: int, place: Place | None, source: tuple[fx.Node, int] | None) -> None:
        """What a call gives is where its choice says, or not split, whatever place a consumer has asked for."""
        values = [(node, number), *((item, 0) for item in node.users if _is_result(item, number))]
        for value in values:
            if found.places.get(value, place) != place:
                del found.places[value]
            if place is not None:
                reach(value, place, source if value == values[0] else values[0])

    def choose(node: fx.Node, choice: Choice, source: tuple[fx.Node, int] | None) -> None:
        if node in found.choices or (may is not None and not may(node, choice)):
            return
        found.choices[node] = choice
        call = spaces.calls[node]
        follow_prefix(call, choice)
        for read, dims in zip(tensor_operands(node), call.rule.operands, strict=True):
            place = place_of(dims, call, choice)
            if place is not None:
                reach((read, 0), place, source or (node, 0))
        for number, dims in enumerate(call.rule.results):
            put(node, number, place_of(dims, call, choice), source if source != (node, number) else None)

    for node, choice in seeds.items():
        choose(node, choice, None)
    for node, place in (inputs or {}).items():
        reach((node, 0), place, None)
    while queue:
        value = queue.popleft()
        node, number = value
        if value not in found.places:
            continue
        place = found.places[value]
        if is_getitem(node):
            reach((operand(node, 0), result_number(node)), place, value)
        elif node in spaces.calls:
            made = choice_at(spaces.calls[node].rule.results[number], spaces.calls[node], place)
            if made is not None:
                choose(node, made, value)
        for user in node.users:
            if _is_result(user, number):
                reach((user, 0), place, value)
            elif user in spaces.calls:
                made = choice_as_operand(user, node, spaces.calls[user], place)
                if made is not None:
                    choose(user, made, value)
    return found


def _may_be_at(value: tuple[fx.Node, int], place: Place, spaces: IndexSpaces, found: Placements) -> bool:
    """Whether the call that gives a value, if it has chosen, puts it there; sums it leaves whole, to be completed."""
    node, number = value
    if is_getitem(node):
        node, number = operand(node, 0), result_number(node)
    choice, call = found.choices.get(node), spaces.calls.get(node)
    return choice is None or call is None or place_of(call.rule.results[number], call, choice) == place


def _is_result(user: fx.Node, number: int) -> bool:
    return is_getitem(user) and result_number(user) == number


def choice_as_operand(user: fx.Node, value: fx.Node, call: OpSpaces, place: Place) -> Choice | None:
    """The choice that `user` makes when it meets `value` split at `place`, at the first operand that allows one."""
    for read, dims in zip(tensor_operands(user), call.rule.operands, strict=True):
        choice = choice_at(dims, call, place) if read is value else None
        if choice is not None:
            return choice
    return None


def follow_prefix(call: OpSpaces, choice: Choice) -> None:
    """The beginning of a sharded dim keeps the longer dim's layout over the ranks."""
    for prefix, whole in call.rule.prefix_of.items():
        if whole == choice.factor:
            short, long = call.leaves_of(prefix)[0], call.leaves_of(whole)[choice.part]
            if short is not long and short.prefix_of is None:
                short.prefix_of = long


def space_at(dims: list[list[Space]], place: Place) -> Space:
    """The space that a value is split over."""
    return leaves(dims[place.dim])[place.part]
