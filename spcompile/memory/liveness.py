"""How many bytes are alive at each call, if values die with their last reader.

The forward keeps what is saved and what the caller gets. The backward makes a value again right before its first
reader, as the partitioner orders it (torch 2.13: torch/_functorch/partitioners.py,
`reordering_to_mimic_autograd_engine`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch.fx as fx

from spcompile.graph.storage import born_at
from spcompile.memory.fusion import fused_away, kernel_ends
from spcompile.memory.joint import Joint, ancestors
from spcompile.memory.row_tiles import find_wide_parts

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


def backward_order(joint: Joint, saved: Collection[fx.Node]) -> list[fx.Node]:
    """The calls of the backward and, each before its first reader, those of the forward that it makes again."""
    order: list[fx.Node] = []
    done: set[fx.Node] = set(saved) | set(joint.inputs)
    for node in joint.backward:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [value for value in top.all_input_nodes if value not in done]
            stack.extend(reversed(missing))
            if not missing:
                stack.pop()
                if top not in done:
                    done.add(top)
                    order.append(top)
    return order


def peak_of(joint: Joint, saved: Collection[fx.Node], away: Away | None = None) -> Peak:
    """Of a step that saves these values of the forward: inputs are not counted, gradients are.

    away: which of them are in the host's memory from forward to backward, and when they are copied.
    """
    return max(
        (_largest(phase, order, levels) for phase, (order, levels) in levels_of(joint, saved, away).items()),
        key=lambda peak: peak.bytes,
    )


def levels_of(
    joint: Joint, saved: Collection[fx.Node], away: Away | None = None
) -> dict[str, tuple[list[fx.Node], list[int]]]:
    """By phase the calls in their order, and the bytes that are alive during each."""
    storage = joint.storage
    forward, backward = orders_of(joint, saved)
    leave, come_back = (away.leave, away.come_back) if away is not None else (_NOTHING, _NOTHING)
    returned = {storage[node] for node in joint.returned}
    kept = {storage[node] for node in saved} - leave.keys() | returned
    held = [root for root in kept if root.op == "call_function"]
    stay = returned | {storage[node] for node in joint.gradients}
    return {
        "forward": (forward, _levels(forward, joint, (), kept, leave=leave)),
        "backward": (backward, _levels(backward, joint, held, stay, come_back=come_back)),
    }


def orders_of(joint: Joint, saved: Collection[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls of forward and backward in their order."""
    needed = ancestors((*saved, *joint.returned))
    return [node for node in joint.forward if node in needed], backward_order(joint, saved)


def _levels(
    order: Sequence[fx.Node],
    joint: Joint,
    before: Collection[fx.Node],
    kept: Collection[fx.Node],
    leave: Mapping[fx.Node, int] = _NOTHING,
    come_back: Mapping[fx.Node, int] = _NOTHING,
) -> list[int]:
    storage = joint.storage.__getitem__
    inside = fused_away(order, {*kept, *leave}, storage) if joint.fuses else ()
    lives = Lives.of(order, before, kept, storage, inside, leave, come_back)
    size = joint.bytes_of.__getitem__
    if joint.tiles > 1:
        in_tiles = _only_in_tiles(order, joint, {*kept, *leave})
        sizes = {root: size(root) // joint.tiles if root in in_tiles else size(root) for root in lives.born}
        size = sizes.__getitem__
    return lives.bytes(size, [joint.scratch[node] for node in order])


def _only_in_tiles(order: Sequence[fx.Node], joint: Joint, kept: Collection[fx.Node]) -> set[fx.Node]:
    """The storages that never stand whole where wide parts run over tiles."""
    parts = find_wide_parts(order, lambda node: joint.storage[node] in kept)
    whole = {joint.storage[node] for part in parts for node in part.whole}
    return {joint.storage[node] for part in parts for node in part.tiled_away} - whole


def _largest(phase: str, order: Sequence[fx.Node], levels: Sequence[int]) -> Peak:
    if not order:
        return Peak(0, phase, None)
    at = levels.index(max(levels))
    return Peak(levels[at], phase, order[at])
