"""What saved bytes are worth: a list of trades, each of which saves less and makes more again, cheapest bytes first.

It starts from what the partitioner saves. A trade gives up one storage; the calls that make it again run back to what
is still saved. The input of a block stays saved, so that no block's recomputation reaches into the one before: two
blocks made again at once are alive at once. Only the last trades give up inputs of blocks, all but every second, then
all but every fourth, and so on: a deep model has more inputs of blocks than a few of its blocks have other values. A
call that draws random numbers or has side effects is never run twice.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from spcompile.graph.edit import is_getitem
from spcompile.memory.joint import Joint


@dataclass(frozen=True)
class Trade:
    """given_up: values no longer saved. instead: inputs of blocks that must be. again: calls that run once more."""

    given_up: tuple[fx.Node, ...]
    instead: tuple[fx.Node, ...]
    again: tuple[fx.Node, ...]
    bytes: int
    seconds: float


@dataclass
class Savings:
    """What is saved and what is made again, after a number of trades.

    block_inputs: values that are saved rather than made again, in order.
    seconds: of a call.
    """

    joint: Joint
    saved: set[fx.Node]
    block_inputs: Sequence[fx.Node]
    seconds: Callable[[fx.Node], float]
    again: set[fx.Node] = field(default_factory=set)
    _views: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    _kept: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.again, self._kept = made_again(self.joint, self.saved), set(self.block_inputs)
        for node in self.joint.forward:
            if node in self.saved:
                self._views.setdefault(self.joint.storage[node], []).append(node)

    def trades(self) -> list[Trade]:
        """All but those of inputs of blocks, in the order in which to make them; makes them."""
        order = {node: at for at, node in enumerate(self.joint.forward)}
        queue = [
            (self._price(trade), order[root], root)
            for root in self._roots()
            if (trade := self._trade([root])) is not None
        ]
        heapq.heapify(queue)
        made: list[Trade] = []
        while queue:
            _, at, root = heapq.heappop(queue)
            trade = self._trade([root])
            if trade is None:
                continue
            price = self._price(trade)
            if queue and price > queue[0][0] * (1 + 1e-9):
                heapq.heappush(queue, (price, at, root))
                continue
            self._make(trade)
            made.append(trade)
        return made

    def of_block_inputs(self) -> list[Trade]:
        """Give up all inputs of blocks but every second, then all but every fourth, as long as that can be done."""
        made: list[Trade] = []
        stored = self.joint.storage
        while len(self.block_inputs) > 2:
            self.block_inputs, unwanted = self.block_inputs[::2], self.block_inputs[1::2]
            self._kept = set(self.block_inputs)
            stays = {stored[node] for node in (*self.joint.returned, *self.block_inputs)}
            trade = self._trade(
                [root for root in dict.fromkeys(map(stored.__getitem__, unwanted)) if root not in stays]
            )
            if trade is None:
                break
            self._make(trade)
            made.append(trade)
        return made

    def _make(self, trade: Trade) -> None:
        self.saved.difference_update(trade.given_up)
        self.saved.update(trade.instead)
        self.again.update(trade.again)
        for node in trade.instead:
            self._views.setdefault(self.joint.storage[node], []).append(node)

    def _roots(self) -> dict[fx.Node, None]:
        stored = self.joint.storage
        stays = {stored[node] for node in (*self.joint.returned, *self.block_inputs)}
        found = {stored[node]: None for node in self.joint.forward if node in self.saved}
        return {root: None for root in found if root.op == "call_function" and root not in stays}

    def _trade(self, roots: Iterable[fx.Node]) -> Trade | None:
        """Give up storages, or None: they cannot be made again, or nothing is won."""
        given_up = [node for root in roots for node in self._views.get(root, ()) if node in self.saved]
        found = self._made_again(given_up, frozenset(given_up))
        if found is None:
            return None
        again, instead = found
        won = self._bytes(given_up) - self._bytes(node for node in instead if not self._is_stored(node))
        if won <= 0 or not given_up:
            return None
        return Trade(tuple(given_up), tuple(instead), tuple(again), won, sum(map(self.seconds, again)))

    def _is_stored(self, node: fx.Node) -> bool:
        """Whether a value, or a view of the same storage, is saved."""
        return any(view in self.saved for view in self._views.get(self.joint.storage[node], ()))

    def _bytes(self, nodes: Iterable[fx.Node]) -> int:
        return sum(map(self.joint.bytes_of.__getitem__, {self.joint.storage[node]: None for node in nodes}))

    def _price(self, trade: Trade) -> float:
        return trade.seconds / trade.bytes

    def _made_again(
        self, wanted: Iterable[fx.Node], given_up: Collection[fx.Node]
    ) -> tuple[dict[fx.Node, None], dict[fx.Node, None]] | None:
        """(calls to run once more, inputs of blocks to save) for these values, or None if they can't be made again."""
        again: dict[fx.Node, None] = {}
        instead: dict[fx.Node, None] = {}
        pending = list(wanted)
        while pending:
            node = pending.pop()
            is_there = node in self.saved or node in self.again or node.op == "placeholder"
            if node in again or (is_there and node not in given_up):
                continue
            if node in self._kept:
                instead[node] = None
                continue
            if _must_run_once(node):
                return None
            again[node] = None
            pending += node.all_input_nodes
        return again, instead


def made_again(joint: Joint, saved: Collection[fx.Node]) -> set[fx.Node]:
    """The calls of the forward that the backward runs once more, if these values are saved."""
    found: set[fx.Node] = set()
    pending = list(joint.read_by_backward)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in found and node not in saved:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _must_run_once(node: fx.Node) -> bool:
    """Whether a call draws random numbers or has side effects."""
    if node.op != "call_function" or is_getitem(node):
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or node.is_impure()


def saved_after(saved: Iterable[fx.Node], trades: Iterable[Trade]) -> list[fx.Node]:
    """What is saved after these trades."""
    kept = dict.fromkeys(saved)
    for trade in trades:
        for node in trade.given_up:
            kept.pop(node, None)
        kept.update(dict.fromkeys(trade.instead))
    return list(kept)
