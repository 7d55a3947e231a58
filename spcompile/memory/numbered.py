"""A joint graph in numbers, to walk it many times: a plan looks at the peaks of a hundred ways to save.

Each node has a number, inputs first. What every walk asks (what a call reads, which storage that is, how large) is
found once. `levels` says what `Lives` and `fused_away` say of any graph, without a dict of nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property

import torch.fx as fx

from spcompile.graph.storage import base_of, born_at, storage_bytes
from spcompile.memory.fusion import MOST_READ, is_fusible, is_made_inside

Lives = list[tuple[int, int, int]]  # a storage, and the first and the last call, by place, at which it is there


class NumberedCalls:
    """nodes: by number. number: of a node. reads, users: of each, numbers. root: the node that made its storage.

    size: bytes that a node allocates.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = tuple(nodes)
        self.number = number = {node: at for at, node in enumerate(self.nodes)}
        self.reads = [tuple(number[value] for value in node.all_input_nodes) for node in self.nodes]
        self.users = [tuple(number[user] for user in node.users if user in number) for node in self.nodes]
        self.root: list[int] = []
        for at, base in enumerate(map(base_of, self.nodes)):
            self.root.append(at if base is None else self.root[number[base]])
        self._born_with = [number[born_at(node)] for node in self.nodes]
        self._is_fusible = [is_fusible(node) for node in self.nodes]
        self._is_made_inside = [is_made_inside(node) for node in self.nodes]
        self._read_roots = [tuple({self.root[value]: None for value in read}) for read in self.reads]

    @cached_property
    def size(self) -> list[int]:
        """Of each node, what it allocates."""
        return [storage_bytes(node) if self.root[at] == at else 0 for at, node in enumerate(self.nodes)]

    def with_all_read(self, order: Iterable[int], wanted: Iterable[int]) -> list[int]:
        """Of an order the calls that these values are computed from, and they themselves."""
        found = bytearray(len(self.nodes))
        pending = list(wanted)
        while pending:
            at = pending.pop()
            if not found[at]:
                found[at] = 1
                pending += self.reads[at]
        return [at for at in order if found[at]]

    def with_made_again(self, order: Iterable[int], there: Iterable[int]) -> list[int]:
        """An order and, each before its first reader, the calls that it needs and that are not there."""
        result: list[int] = []
        reads, done = self.reads, bytearray(len(self.nodes))
        for at in there:
            done[at] = 1
        for at in order:
            stack = [at]
            while stack:
                top = stack[-1]
                missing = [value for value in reads[top] if not done[value]]
                if missing:
                    stack.extend(reversed(missing))
                    continue
                stack.pop()
                if not done[top]:
                    done[top] = 1
                    result.append(top)
        return result

    def lives(
        self,
        order: Sequence[int],
        before: Iterable[int],
        kept: Collection[int],
        leave: Mapping[int, int],
        come_back: Mapping[int, int],
        fuses: bool,
    ) -> Lives:
        """When storages are there in an order; arguments as of `liveness.Lives.of`."""
        calls, root = len(order), self.root
        place = [-1] * len(self.nodes)
        for at, node in enumerate(order):
            place[node] = at
        inside = self._fused_away(order, {*kept, *leave}) if fuses else bytearray(len(self.nodes))
        ends = self._kernel_ends(order, place, inside) if any(inside) else range(calls)
        born, dies = [-1] * len(self.nodes), [-1] * len(self.nodes)
        for storage in before:
            born[storage] = dies[storage] = 0
        read_roots, born_with = self._read_roots, self._born_with
        for (at, node), end in zip(enumerate(order), ends, strict=True):
            own = root[node]
            if own == node and not inside[node] and born[node] < 0:
                born[node] = place[born_with[node]] if place[born_with[node]] >= 0 else at
            if dies[own] < end:
                dies[own] = end
            for storage in read_roots[node]:
                if dies[storage] < end:
                    dies[storage] = end
        for storage in kept:
            dies[storage] = calls - 1
        for storage, end in leave.items():
            dies[storage] = max(end - 1, dies[storage])
        for storage, start in come_back.items():
            born[storage] = start
        return [(storage, start, dies[storage]) for storage, start in enumerate(born) if start >= 0]

    def levels(self, order: Sequence[int], lives: Lives, sizes: Sequence[int], scratch: Sequence[int]) -> list[int]:
        """Bytes that are alive during each call of an order.

        sizes, scratch: of each node, bytes that it allocates and that it takes besides while it runs.
        """
        change = [0] * (len(order) + 1)
        for storage, start, end in lives:
            change[start] += sizes[storage]
            change[end + 1] -= sizes[storage]
        held = itertools.accumulate(change[:-1])
        return [bytes_held + scratch[node] for bytes_held, node in zip(held, order, strict=True)]

    def _fused_away(self, order: Sequence[int], kept: Collection[int]) -> bytearray:
        """By number, whether a call's value is never written."""
        inside, is_read = bytearray(len(self.nodes)), bytearray(len(self.nodes))
        made = [node for node in order if self.root[node] == node]
        for node in made:
            inside[node] = self._is_made_inside[node]
        for node in made:
            for storage in self._read_roots[node]:
                is_read[storage] = 1
                if not self._is_fusible[node]:
                    inside[storage] = 0
        for storage in kept:
            inside[storage] = 0
        reads: dict[int, set[int]] = {}  # of what is not written: the storages that it is made from
        for node in made:
            if inside[node] and is_read[node]:
                found = {source for own in self._read_roots[node] for source in reads.get(own, (own,))}
                if len(found) <= MOST_READ:
                    reads[node] = found
                    continue
            inside[node] = 0
        return inside

    def _kernel_ends(self, order: Sequence[int], place: Sequence[int], inside: bytearray) -> list[int]:
        """For each call of an order, up to which call what it reads must be there."""
        ends = list(range(len(order)))
        root, users = self.root, self.users
        for at in reversed(range(len(order))):
            node = order[at]
            if inside[node] or root[node] != node:
                last = at
                for user in users[node]:
                    if place[user] > at and ends[place[user]] > last:
                        last = ends[place[user]]
                ends[at] = last
        return ends
