"""How many bytes are alive at each call, if values die with their last reader.

The forward keeps what is saved and what the caller gets. The backward makes a value again right before its first
reader, as the partitioner orders it (torch 2.13: torch/_functorch/partitioners.py,
`reordering_to_mimic_autograd_engine`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.fx as fx

from spcompile.graph.storage import born_at
from spcompile.memory.fusion import MOST_READ, kernel_ends
from spcompile.memory.joint import Joint
from spcompile.memory.row_tiles import WidePart, sums_in_float32

_NOTHING: Mapping[fx.Node, int] = MappingProxyType({})


@dataclass(frozen=True)
class Peak:
    """The most that is alive at once, inputs of the step aside: bytes, in which phase, and at which call."""

    bytes: int
    phase: str
    at: fx.Node | None


@dataclass(frozen=True)
class Away:
    """Storages that are in the host's memory between forward and backward.

    leave: storage -> the call of the forward, by place, in front of which its copy has arrived. come_back: storage ->
    the call of the backward in front of which its copy back starts. bytes: of all. seconds: for which compute waits.
    """

    values: tuple[fx.Node, ...]
    leave: Mapping[fx.Node, int]
    come_back: Mapping[fx.Node, int]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Lives:
    """Of each storage the first and the last call, by place, at which it is there. calls: how many there are."""

    born: dict[fx.Node, int]
    dies: dict[fx.Node, int]
    calls: int

    @classmethod
    def of(
        cls,
        order: Sequence[fx.Node],
        before: Collection[fx.Node],
        kept: Collection[fx.Node],
        root: Callable[[fx.Node], fx.Node],
        inside: Collection[fx.Node] = (),
        leave: Mapping[fx.Node, int] = _NOTHING,
        come_back: Mapping[fx.Node, int] = _NOTHING,
    ) -> Lives:
        """before: storages that are there at the start, to die with their last reader. kept: those that stay.

        inside: calls whose values are fused away: what they read is read by the kernels that they are part of.
        leave: storages that are copied to the host -> the call, by place, before which they may be gone. come_back:
        storages that were -> the call before which their copy starts.
        """
        place = {node: at for at, node in enumerate(order)}
        born, dies = dict.fromkeys(before, 0), dict.fromkeys(before, 0)
        ends = kernel_ends(order, inside, root) if inside else range(len(order))
        for node, at in place.items():
            own = root(node)
            if own is node and node not in inside:
                born.setdefault(own, place.get(born_at(own), at))
            for value in (node, *node.all_input_nodes):
                dies[root(value)] = max(ends[at], dies.get(root(value), at))
        dies.update((storage, len(order) - 1) for storage in kept if storage in born)
        dies.update((storage, max(end - 1, dies[storage])) for storage, end in leave.items())
        born.update(come_back)
        return cls(born, {storage: dies[storage] for storage in born}, len(order))

    def bytes(self, size: Callable[[fx.Node], int], scratch: Sequence[int]) -> list[int]:
        """Alive during each call. scratch: what each call takes besides while it runs."""
        if not self.calls:  # what is saved, and a backward that computes nothing
            return []
        change = [0] * (self.calls + 1)
        for storage, start in self.born.items():
            change[start] += size(storage)
            change[self.dies[storage] + 1] -= size(storage)
        held = itertools.accumulate(change[:-1])
        return [bytes_held + inside for bytes_held, inside in zip(held, scratch, strict=True)]

    def during(self, call: int) -> list[fx.Node]:
        """The storages that are there during a call."""
        return [storage for storage, start in self.born.items() if start <= call <= self.dies[storage]]


def peak_of(joint: Joint, saved: Collection[fx.Node], away: Away | None = None) -> Peak:
    """Of a step that saves these values of the forward: inputs are not counted, gradients are.

    away: which of them are in the host's memory from forward to backward, and when they are copied.
    """
    return highest(levels_of(joint, saved, away))


def highest(levels: Mapping[str, tuple[Sequence[fx.Node], Sequence[int]]]) -> Peak:
    """The peak of what `levels_of` gives."""
    return max((_largest(phase, *found) for phase, found in levels.items()), key=lambda peak: peak.bytes)


def levels_of(
    joint: Joint, saved: Collection[fx.Node], away: Away | None = None
) -> dict[str, tuple[list[fx.Node], list[int]]]:
    """By phase the calls in their order, and the bytes that are alive during each."""
    storage, walk = joint.storage, walk_of(joint, saved)
    leave, come_back = (away.leave, away.come_back) if away is not None else (_NOTHING, _NOTHING)
    returned = {storage[node] for node in joint.returned}
    kept = {storage[node] for node in saved} - leave.keys() | returned
    held = [root for root in kept if root.op == "call_function"]
    stay = returned | {storage[node] for node in joint.gradients}
    return {
        "forward": (walk.forward.calls, _levels(walk.forward, joint, (), kept, leave=leave)),
        "backward": (walk.backward.calls, _levels(walk.backward, joint, held, stay, come_back=come_back)),
    }


def most_by_part(levels: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    """The largest of the levels of a forward, and of the first and the last two thirds of those of a backward.

    In a backward the bytes of what is saved fall, those of gradients grow: the most is near one of its ends. So each of
    the three grows by the same with each layer. Of two layers each part has one whole: halves would cut the last layer
    in two where the calls of the model's head stand before it.
    """
    backward = levels.get("backward", ())
    third = len(backward) // 3
    forward = levels.get("forward", levels.get("inference", ()))
    return max(forward, default=0), max(backward[: len(backward) - third], default=0), max(backward[third:], default=0)


@dataclass
class Order:
    """Calls of one phase in their order, and by number. What was found of them, for whoever looks again:

    lives: of storages, where none of them goes to the host. parts: that could run over tiles. beside: by the number of
    tiles, what `_beside_tiles` says.
    """

    calls: list[fx.Node]
    numbers: list[int]
    lives: list[tuple[int, int, int]] | None = None
    parts: list[WidePart] | None = None
    beside: dict[int, dict[fx.Node, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """A step that saves some values: the calls of the forward; those of the backward and those that it makes again."""

    forward: Order
    backward: Order


def walk_of(joint: Joint, saved: Collection[fx.Node]) -> Walk:
    """Of a step that saves these values: each call that is made again stands before its first reader."""
    calls, of = joint.numbered, joint.numbered.number.__getitem__
    own = frozenset(map(of, saved))
    if own not in joint.walks:
        forward = calls.with_all_read(map(of, joint.forward), [*own, *map(of, joint.returned)])
        backward = calls.with_made_again(map(of, joint.backward), [*own, *map(of, joint.inputs)])
        orders = (Order([calls.nodes[at] for at in order], order) for order in (forward, backward))
        joint.walks[own] = Walk(*orders)
    found: Walk = joint.walks[own]
    return found


def _levels(
    order: Order,
    joint: Joint,
    before: Collection[fx.Node],
    kept: Collection[fx.Node],
    leave: Mapping[fx.Node, int] = _NOTHING,
    come_back: Mapping[fx.Node, int] = _NOTHING,
) -> list[int]:
    calls, of = joint.numbered, joint.numbered.number.__getitem__
    if not order.calls:
        return []
    sizes, scratch = calls.size, joint.scratch
    if joint.tiles > 1:
        if order.parts is None:
            whole = {*kept, *leave}  # what goes to the host stood whole before
            order.parts = joint.wide_parts.find(order.calls, lambda node: joint.storage[node] in whole)
        if joint.tiles not in order.beside:
            order.beside[joint.tiles] = _beside_tiles(order.parts, order.calls, joint)
        sizes, scratch = list(sizes), list(scratch)
        for root in _only_in_tiles(order.parts, joint):
            sizes[of(root)] //= joint.tiles
        for call, more in order.beside[joint.tiles].items():
            scratch[of(call)] += more
    lives = order.lives
    if lives is None or leave or come_back:
        lives = calls.lives(
            order.numbers,
            [of(root) for root in before],
            [of(root) for root in kept],
            {of(root): at for root, at in leave.items()},
            {of(root): at for root, at in come_back.items()},
            joint.fuses,
        )
        if not leave and not come_back:
            order.lives = lives
    return calls.levels(order.numbers, lives, sizes, scratch)


def _only_in_tiles(parts: Iterable[WidePart], joint: Joint) -> set[fx.Node]:
    """The storages that never stand whole where wide parts run over tiles."""
    whole = {joint.storage[node] for part in parts for node in part.whole}
    return {joint.storage[node] for part in parts for node in part.tiled_away} - whole


def _beside_tiles(parts: Sequence[WidePart], order: Sequence[fx.Node], joint: Joint) -> dict[fx.Node, int]:
    """What is alive during calls of parts because all of a part runs for one tile after the other.

    Rows of narrow results are there from the first tile on, and beside all of them once more where they are put
    together; sums over rows are there from the first tile on, and each beside itself where a tile adds to it; what a
    part reads stays until its last tile.
    """
    place = {node: at for at, node in enumerate(order)}
    last = {joint.storage[value]: at for at, node in enumerate(order) for value in node.all_input_nodes}
    found: dict[fx.Node, int] = defaultdict(int)
    for part in parts:
        calls = sorted((place[node], node) for node in part.calls)
        end, own = calls[-1][0], {joint.storage[node] for node in part.calls}
        read = {joint.storage[value] for _, node in calls for value in node.all_input_nodes} - own
        gone = [(last[root], joint.bytes_of[root]) for root in read if last[root] < end and root.op == "call_function"]
        made = [(place[node], joint.bytes_of[joint.storage[node]]) for node in part.narrow]
        sums = {place[node]: _bytes_of_sum(node, joint) for node in part.sums}
        for at, node in calls:
            found[node] += sum(size for start, size in made if at < start) * (joint.tiles - 1) // joint.tiles
            found[node] += sum(size for stop, size in gone if stop < at)
            found[node] += sum(total if at < start else total - size for start, (size, total, _) in sums.items())
            found[node] += sums[at][2] if at in sums else 0
        if made:
            found[calls[-1][1]] += max(size for _, size in made)
    return found


def _bytes_of_sum(node: fx.Node, joint: Joint) -> tuple[int, int, int]:
    """Of a sum over rows that runs over tiles: (its bytes, those of what is summed up, those beside where a tile adds).

    A product adds to a sum as it is computed. Others are added by elementwise calls, of which a compiler that fuses
    makes one kernel for as many tiles as it may read.
    """
    size = joint.bytes_of[joint.storage[node]]
    total = size * 4 // node.meta["val"].element_size() if sums_in_float32(node) else size
    if total == size and node.target is torch.ops.aten.mm.default:
        return size, total, total
    tiles = min(joint.tiles, MOST_READ) if joint.fuses else 1
    return size, total, total + (tiles - 1 if total == size else tiles) * size


def _largest(phase: str, order: Sequence[fx.Node], levels: Sequence[int]) -> Peak:
    if not order:
        return Peak(0, phase, None)
    at = levels.index(max(levels))
    return Peak(levels[at], phase, order[at])
