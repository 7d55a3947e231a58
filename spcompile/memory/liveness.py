"""How many bytes are alive at each call, if values die with their last reader.

The forward keeps what is saved and what the caller gets. The backward makes a value again right before its first
reader, as the partitioner orders it (torch 2.13: torch/_functorch/partitioners.py,
`reordering_to_mimic_autograd_engine`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch.fx as fx

from spcompile.graph.storage import born_at
from spcompile.memory.fusion import fused_away, kernel_ends
from spcompile.memory.joint import Joint, ancestors


@dataclass(frozen=True)
class Peak:
    """The most that is alive at once, inputs of the step aside: bytes, in which phase, and at which call."""

    bytes: int
    phase: str
    at: fx.Node | None


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
    ) -> Lives:
        """before: storages that are there at the start, to die with their last reader. kept: those that stay.

        inside: calls whose values are fused away: what they read is read by the kernels that they are part of.
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
        return cls(born, {storage: dies[storage] for storage in born}, len(order))

    def bytes(self, size: Callable[[fx.Node], int], scratch: Sequence[int]) -> list[int]:
        """Alive during each call. scratch: what each call takes besides while it runs."""
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


def peak_of(joint: Joint, saved: Collection[fx.Node]) -> Peak:
    """Of a step that saves these values of the forward: inputs are not counted, gradients are."""
    return max(
        (_largest(phase, order, levels) for phase, (order, levels) in levels_of(joint, saved).items()),
        key=lambda peak: peak.bytes,
    )


def levels_of(joint: Joint, saved: Collection[fx.Node]) -> dict[str, tuple[list[fx.Node], list[int]]]:
    """By phase the calls in their order, and the bytes that are alive during each."""
    storage = joint.storage
    returned = {storage[node] for node in joint.returned}
    kept = {storage[node] for node in saved} | returned
    needed = ancestors((*saved, *joint.returned))
    forward = [node for node in joint.forward if node in needed]
    backward = backward_order(joint, saved)
    held = [root for root in kept if root.op == "call_function"]
    stay = returned | {storage[node] for node in joint.gradients}
    return {
        "forward": (forward, _levels(forward, joint, (), kept)),
        "backward": (backward, _levels(backward, joint, held, stay)),
    }


def _levels(
    order: Sequence[fx.Node], joint: Joint, before: Collection[fx.Node], kept: Collection[fx.Node]
) -> list[int]:
    storage = joint.storage.__getitem__
    inside = fused_away(order, kept, storage) if joint.fuses else ()
    lives = Lives.of(order, before, kept, storage, inside)
    return lives.bytes(joint.bytes_of.__getitem__, [joint.scratch[node] for node in order])


def _largest(phase: str, order: Sequence[fx.Node], levels: Sequence[int]) -> Peak:
    if not order:
        return Peak(0, phase, None)
    at = levels.index(max(levels))
    return Peak(levels[at], phase, order[at])
