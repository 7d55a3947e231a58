"""The joint graph of a step, seen as memory: what forward and backward compute, read and keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch.fx as fx

from spcompile.collectives import COLLECTIVES
from spcompile.graph.sizes import hint
from spcompile.graph.storage import outputs_of, root_of
from spcompile.machine.accelerators import Accelerator
from spcompile.memory.inside_calls import bytes_inside
from spcompile.memory.numbered import NumberedCalls
from spcompile.memory.row_tiles import WidePartFinder


@dataclass(frozen=True)
class Joint:
    """A joint graph, taken apart.

    forward: the calls that need no gradient of an output, in order. backward: all other calls, in the order in which
    they will run.
    returned: the outputs of the forward. gradients: the outputs of the backward.
    parameters: the inputs that get a gradient. accelerator: what computes. fuses: the compiler behind fuses
    elementwise calls. tiles: of rows, over which wide parts run.
    """

    inputs: tuple[fx.Node, ...]
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]
    gradients: tuple[fx.Node, ...]
    parameters: frozenset[fx.Node]
    accelerator: Accelerator
    fuses: bool = False
    tiles: int = 1

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        forward_outputs: int,
        accelerator: Accelerator,
        fuses: bool = False,
        sends_early: bool = True,
    ) -> Joint:
        """forward_outputs: how many of the graph's outputs are the forward's; the others are gradients of inputs.

        sends_early: gradients travel once they are there, though they become larger where they are gathered.
        """
        outputs = outputs_of(graph)
        inputs = tuple(graph.find_nodes(op="placeholder"))
        returned = _nodes(outputs[:forward_outputs])
        later = {node for node in inputs if "tangents" in str(node.target)}
        primals = [node for node in inputs if node not in later]
        calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        for node in calls:
            if any(value in later for value in node.all_input_nodes):
                later.add(node)
        backward = tuple(node for node in calls if node in later)
        pairs = zip(primals, outputs[forward_outputs:], strict=False)
        return cls(
            inputs=inputs,
            forward=tuple(node for node in calls if node not in later),
            backward=_sent_early(backward) if sends_early else backward,
            returned=returned,
            gradients=_nodes(outputs[forward_outputs:]),
            parameters=frozenset(primal for primal, gradient in pairs if isinstance(gradient, fx.Node)),
            accelerator=accelerator,
            fuses=fuses,
        )

    @cached_property
    def storage(self) -> dict[fx.Node, fx.Node]:
        """Of each value the node that made its storage."""
        numbered = self.numbered
        return {node: numbered.nodes[root] for node, root in zip(numbered.nodes, numbered.root, strict=True)}

    @cached_property
    def bytes_of(self) -> dict[fx.Node, int]:
        """What each node allocates."""
        return dict(zip(self.numbered.nodes, self.numbered.size, strict=True))

    @cached_property
    def numbered(self) -> NumberedCalls:
        """All nodes, to walk in many orders."""
        return NumberedCalls((*self.inputs, *self.forward, *self.backward))

    @cached_property
    def scratch(self) -> list[int]:
        """What each node takes besides while it runs, by number."""
        return [int(bytes_inside(node, self.accelerator, hint)) for node in self.numbered.nodes]

    @cached_property
    def wide_parts(self) -> WidePartFinder:
        """What could run over tiles of rows."""
        return WidePartFinder()

    @cached_property
    def walks(self) -> dict[frozenset[int], Any]:
        """By the numbers of what is saved, the calls of a step in their order: see `liveness.walk_of`."""
        return {}

    @cached_property
    def is_forward(self) -> frozenset[fx.Node]:
        """`forward`, to look up."""
        return frozenset(self.forward)

    @cached_property
    def read_by_backward(self) -> tuple[fx.Node, ...]:
        """The values of the forward that the backward computes with, or returns."""
        found = {value: None for node in self.backward for value in node.all_input_nodes if value in self.is_forward}
        found.update((value, None) for value in self.gradients if value in self.is_forward)
        return tuple(found)

    def over_tiles(self, tiles: int) -> Joint:
        """The same, where wide parts run over tiles of rows; what does not depend on them is not found again."""
        other = replace(self, tiles=tiles)
        for name in ("numbered", "scratch", "wide_parts", "walks"):
            other.__dict__[name] = getattr(self, name)
        return other

    @property
    def input_bytes(self) -> int:
        """Of all inputs of the forward: parameters, buffers and the batch."""
        return sum(self.bytes_of[node] for node in self.inputs if "tangents" not in str(node.target))


def _sent_early(calls: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The order with collectives that nothing is computed with right behind what they read.

    Autograd has them where it has the gradients of inputs, at the end; `overlap-collectives` starts them at once.
    """
    leaves: set[fx.Node] = set()
    for node in reversed(calls):
        if node.target in COLLECTIVES or root_of(node) is not node:
            leaves.update([node] if all(user.op == "output" or user in leaves for user in node.users) else [])
    place: dict[fx.Node, int] = {}
    for at, node in enumerate(calls):
        read = [place[value] for value in node.all_input_nodes if value in place]
        place[node] = max(read, default=-1) if node in leaves else at
    return tuple(sorted(calls, key=place.__getitem__))


def _nodes(values: Iterable[object]) -> tuple[fx.Node, ...]:
    return tuple(value for value in values if isinstance(value, fx.Node))


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found, pending = set(nodes), list(nodes)
    while pending:
        new = [value for value in pending.pop().all_input_nodes if value not in found]
        found.update(new)
        pending += new
    return found
