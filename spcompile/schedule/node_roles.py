"""What each node of a final graph is to the list scheduler: what may wait, what is early, what collectives need."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.fx as fx

from spcompile.graph.edit import is_getitem
from spcompile.graph.storage import root_of
from spcompile.schedule.op_cost import bytes_of, readers_of
from spcompile.schedule.timeline import is_wait, starts

aten = torch.ops.aten
_MOVES = {
    aten._unsafe_view,
    aten.cat,
    aten.clone,
    aten.constant_pad_nd,
    aten.flip,
    aten.index_select,
    aten.repeat,
    aten.slice,
    aten.stack,
}
_REPEATED_DRAW = torch.ops.higher_order.run_and_save_rng_state  # draws what the backward draws once more


class Roles:
    """What every node is to the scheduler.

    inputs: values that must be there first, and what must have run before for its side effects.
    lazy: runs right before its first reader. final: collectives whose result only leaves the graph. early: those of
    inputs, or of what is cheap to make from them. leads: on the way to a collective that compute waits for, with the
    place of the first one. first_use: the place of the first reader that is not lazy.
    """

    def __init__(self, nodes: list[fx.Node], place: dict[fx.Node, int], heavy: Callable[[fx.Node], bool]) -> None:
        effects = side_effects(nodes)
        self.inputs = {n: list(dict.fromkeys([*n.all_input_nodes, *effects.get(n, ())])) for n in nodes}
        self.readers: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        self.lazy: set[fx.Node] = set()
        self.early: set[fx.Node] = set()
        light: set[fx.Node] = set()
        for node in nodes:
            for value in self.inputs[node]:
                self.readers[value].append(node)
            from_inputs = all(value in light for value in self.inputs[node])
            is_call, is_pure = node.op == "call_function", node not in effects
            if starts(node):
                self.early.update([node] if from_inputs else [])
            elif not is_call or (from_inputs and is_pure and not heavy(node)):
                light.add(node)
            if not is_call or is_wait(node) or (is_pure and (node in light or renames(node))):
                self.lazy.add(node)
        self.lazy.difference_update([node for node in self.lazy & light if _keeps_alive(node, light)])
        self.first_use: dict[fx.Node, float] = {}
        self.leads: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            readers = [r for r in self.readers[node] if r.op != "output"]
            uses = [self.first_use[r] if r in self.lazy else place[r] for r in readers]
            self.first_use[node] = min(uses, default=math.inf)
            served = [self.leads[r] for r in readers if r in self.leads]
            served += [place[r] for r in readers if starts(r) and not self.is_final(r) and r not in self.early]
            if served:
                self.leads[node] = min(served)

    def is_final(self, start: fx.Node) -> bool:
        """Whether nothing in the graph computes with the result of a collective."""
        return self.first_use[start] == math.inf


def renames(node: fx.Node) -> bool:
    """Whether a call only gives elements another place or name, or is a size."""
    if is_getitem(node) or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return True
    return root_of(node) is not node or getattr(node.target, "overloadpacket", None) in _MOVES


def _keeps_alive(node: fx.Node, light: set[fx.Node]) -> bool:
    """Whether a call, put off, keeps something larger than its result alive that others need before."""
    if node.op != "call_function" or renames(node):
        return False
    made = [root for root in map(root_of, node.all_input_nodes) if root.op == "call_function"]
    early = [root for root in made if any(reader not in light for reader in readers_of(root))]
    return max(map(bytes_of, early), default=0) > bytes_of(node)


def grows(start: fx.Node) -> bool:
    """Whether a collective gives more bytes than it reads, as a gather."""
    return bytes_of(start) > sum(map(bytes_of, start.all_input_nodes))


def side_effects(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Nodes with side effects -> what must stand before them: the one before, and readers of what they write.

    And readers of what was written -> the node that wrote it.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    last: fx.Node | None = None
    readers: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    written: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        roots = {root_of(value) for value in node.all_input_nodes}
        if _has_effect(node):
            found[node] = [*([last] if last is not None else []), *(r for root in roots for r in readers[root])]
            last = node
            writes = node.is_impure() and getattr(getattr(node.target, "_schema", None), "is_mutable", True)
            written.update(dict.fromkeys(roots if writes else (), node))
        elif any(root in written for root in roots) and node.op == "call_function":
            found[node] = [written[root] for root in roots if root in written]
        for root in roots:
            readers[root].append(node)
    return found


def _has_effect(node: fx.Node) -> bool:
    if node.op != "call_function" or starts(node) or is_wait(node):
        return False
    return node.target is _REPEATED_DRAW or node.is_impure()
