"""Which saved values wait for the backward in the memory of the host, and when they are copied.

Those go first that are made first: they are needed last, so that their copies have the most compute to hide behind.
Times come from the tables (`spcompile/schedule/host_windows.py`), as everything that is planned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx

from spcompile.collectives import COLLECTIVES
from spcompile.graph.sizes import hint, numel_hint
from spcompile.graph.storage import born_at
from spcompile.memory.joint import Joint
from spcompile.memory.liveness import Away, walk_of
from spcompile.schedule.host_windows import windows_back, windows_out
from spcompile.schedule.op_cost import CostModel

Uses = tuple[dict[fx.Node, int], dict[fx.Node, int]]
_LEAST = 0.01  # of the largest value: what is smaller is not worth a copy of its own


def _is_whole(node: fx.Node, size: int) -> bool:
    """Whether a value is as large as its storage, and its dims only stand in another order there."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or numel_hint(value) * value.element_size() != size:
        return False
    step = 1
    for stride, length in sorted(zip(map(hint, value.stride()), map(hint, value.shape), strict=True)):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


@dataclass(frozen=True)
class Clock:
    """Forward and backward of a step that saves these values: the calls, by place, and what each takes."""

    joint: Joint
    saved: Collection[fx.Node]
    cost: CostModel
    forward: Sequence[fx.Node]
    backward: Sequence[fx.Node]

    @classmethod
    def of(cls, joint: Joint, saved: Collection[fx.Node], cost: CostModel) -> Clock:
        """cost: of one graph."""
        walk = walk_of(joint, saved)
        return cls(joint, saved, cost, walk.forward.calls, walk.backward.calls)

    def can_go(self) -> list[fx.Node]:
        """The saved values that can be copied to the host, in the order in which they are made.

        Each is all of its storage, without gaps, and nobody else keeps that: neither the caller nor another saved view.
        One result of a call that the backward runs again, for another, is not saved in the end.
        """
        stored, size = self.joint.storage, self.joint.bytes_of
        views: dict[fx.Node, list[fx.Node]] = {}
        for node in self.saved:
            views.setdefault(stored[node], []).append(node)
        stays = {stored[node] for node in (*self.joint.returned, *self.joint.gradients)}
        again = set(self.backward)
        alone = {root: own[0] for root, own in views.items() if len(own) == 1 and root.op == "call_function"}
        alone = {root: node for root, node in alone.items() if born_at(root) not in again}
        read, _ = self._uses[1]
        alone = {root: node for root, node in alone.items() if root in read and root not in stays}
        found = {root: node for root, node in alone.items() if _is_whole(node, size[root])}
        least = _LEAST * max((size[root] for root in found), default=0)
        return [found[root] for root in self.joint.forward if root in found and size[root] >= least]

    def away(self, values: Sequence[fx.Node]) -> Away:
        """When these values, which are in the order in which they are made, are copied."""
        stored, cost = self.joint.storage, self.cost
        roots = [stored[node] for node in values]
        takes = {root: cost.host_copy(self.joint.bytes_of[root]) for root in roots}
        made, last = self._uses[0]
        out = windows_out(self._seconds[0], [(made[root], last[root], takes[root]) for root in roots])
        first, _ = self._uses[1]
        wanted = [root for root in first if root in takes]
        back = windows_back(self._seconds[1], [(first[root], takes[root]) for root in wanted])
        return Away(
            values=tuple(values),
            leave={root: window.end for root, window in zip(roots, out, strict=True)},
            come_back={root: window.start for root, window in zip(wanted, back, strict=True)},
            bytes=sum(self.joint.bytes_of[root] for root in roots),
            seconds=sum(window.late for window in (*out, *back)),
        )

    @cached_property
    def _seconds(self) -> tuple[list[float], list[float]]:
        forward, backward = (list(map(self._seconds_of, at)) for at in (self.forward, self.backward))
        return forward, backward

    def _seconds_of(self, node: fx.Node) -> float:
        """A collective that becomes a start and a wait runs beside other calls; a ring waits inside its own."""
        target: Any = node.target
        collective, work = COLLECTIVES.get(target), self.cost.work(node)
        return work.compute if collective is not None and collective.lowered is not None else work.seconds

    @cached_property
    def _uses(self) -> tuple[Uses, Uses]:
        forward, backward = map(self._uses_in, (self.forward, self.backward))
        return forward, backward

    def _uses_in(self, order: Sequence[fx.Node]) -> Uses:
        """Of each storage the places of the first and of the last call that makes, reads or views it."""
        stored = self.joint.storage
        first: dict[fx.Node, int] = {}
        last: dict[fx.Node, int] = {}
        for at, node in enumerate(order):
            for value in (node, *node.all_input_nodes):
                first.setdefault(stored[value], at)
                last[stored[value]] = at
        return first, last
