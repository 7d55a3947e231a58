"""The order of a final graph in which communication hides behind compute: a list scheduler with a simulated clock.

Compute keeps the order that autograd gave, with these exceptions. A collective starts as soon as its operand is there.
What only moves or waits (views, copies, waits, and what is cheap to make from inputs) stands right before its first
reader. Compute that no later collective depends on, such as products that give gradients of weights, steps back for
compute that one depends on, and runs while that is on its way (as Zheng et al. 2022, Alpa, section 6, and Inductor's
overlap scheduling). Of compute that collectives depend on, what the first of them needs goes first: q is projected,
rotated and sent before k is projected. A gather of inputs starts so long before its use that the table says it
arrives. Gradients travel when their axis has nothing better to do, and are waited for at the end. All that these
exceptions keep alive is held under a number of bytes. Every node is looked at a bounded number of times.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable

import torch
import torch.fx as fx

from spcompile.graph.edit import is_getitem
from spcompile.graph.storage import root_of
from spcompile.schedule.op_cost import CostModel, bytes_of
from spcompile.schedule.timeline import is_wait, starts, transfer

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
_WINDOW = 16  # how many nodes that could run are looked at
Turn = tuple[int, int]  # the place of the first collective that a node leads to, or its own; its own
PLACE = "spx_place"  # in meta: where autograd put a node, so that a second run finds the same order


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
            if starts(node):
                self.early.update([node] if from_inputs else [])
            elif node.op != "call_function" or (from_inputs and node not in effects and not heavy(node)):
                light.add(node)
            if (
                node.op != "call_function"
                or is_wait(node)
                or (node not in effects and (node in light or renames(node)))
            ):
                self.lazy.add(node)
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


class ListScheduler:
    """Makes the order.

    budget: bytes that may be alive for the sake of overlap. ahead: a gather starts so many times its seconds early.
    """

    def __init__(self, graph: fx.Graph, cost: CostModel, budget: float, ahead: float) -> None:
        self.cost, self.budget = cost, budget
        self.place = {node: node.meta.setdefault(PLACE, at) for at, node in enumerate(graph.nodes)}
        self.nodes = sorted(graph.nodes, key=lambda node: self.place[node])
        self.seconds = {n: 0.0 if starts(n) or is_wait(n) else cost.work(n).seconds for n in self.nodes}
        self.at_place: dict[float, fx.Node] = {at: node for node, at in self.place.items()}
        self.transfers = {n: transfer(n, cost) for n in self.nodes if starts(n)}
        self.roles = Roles(self.nodes, self.place, cost.is_heavy)
        self.order: list[fx.Node] = []
        self.done: set[fx.Node] = set()
        self.missing = {n: len(self.roles.inputs[n]) for n in self.nodes}
        self.when: dict[fx.Node, float] = {}  # a value that is there or could be -> when
        self.now = 0.0
        self.computed = 0.0
        self.free: defaultdict[str, float] = defaultdict(float)  # axis -> when it is idle
        self.turn = {
            n: (place if starts(n) else self.roles.leads.get(n, place), place) for n, place in self.place.items()
        }
        self.ready: dict[bool, list[tuple[Turn, fx.Node]]] = {True: [], False: []}  # by whether a collective depends
        self.held: Counter[fx.Node] = Counter()  # value -> readers that could run but have not
        self.bytes = 0.0
        self.gradients: deque[fx.Node] = deque()  # final collectives that could start
        self.unwaited: deque[fx.Node] = deque()  # final collectives that have, and keep something alive
        self.gathers = self._gathers(ahead)
        self.last_start = max((self.place[n] for n in self.nodes if self._is_critical(n)), default=-1)

    def run(self) -> list[fx.Node]:
        """All nodes of the graph, in the new order."""
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._finish(node)
        for node in self.nodes:
            if node.op == "call_function" and not self.roles.inputs[node]:
                self._offer(node)
        while True:
            self._start_gradients()
            node = self._choose()
            if self._start_gathers(self.computed + (self.seconds[node] if node else 0.0)):
                continue
            if node is None:
                break
            self._run(node)
        while self.gradients:
            self._start(self.gradients.popleft())
        while self.unwaited:
            self._wait_for_oldest()
        for node in self.nodes:
            self._pull(node)
        return self.order

    def _is_critical(self, node: fx.Node) -> bool:
        return starts(node) and not self.roles.is_final(node) and node not in self.roles.early

    def _gathers(self, ahead: float) -> dict[str, deque[tuple[float, fx.Node]]]:
        """Axis -> (computed seconds at which to start, early collective), in the order of their uses.

        So that each has `ahead` times its seconds for itself before the next one starts or its reader runs.
        """
        before, total = {}, 0.0
        for node in self.nodes:
            before[float(self.place[node])] = total
            total += self.seconds[node]
        found: dict[str, deque[tuple[float, fx.Node]]] = defaultdict(deque)
        early = [n for n in self.roles.early if not self.roles.is_final(n)]
        for node in sorted(early, key=lambda n: (-self.roles.first_use[n], -self.place[n])):
            axis, seconds, _ = self.transfers[node]
            at = before[self.roles.first_use[node]]
            if found[axis]:
                at = min(at, found[axis][0][0])
            found[axis].appendleft((at - ahead * seconds, node))
        return found

    def _offer(self, node: fx.Node) -> None:
        """All inputs of a node are there, or could be."""
        if node in self.done:
            return
        when = max((self.when[value] for value in self.roles.inputs[node]), default=0.0)
        if node in self.roles.lazy:
            self.when[node] = max(when, self.when.get(node, 0.0))
            self._tell_readers(node)
        elif starts(node) and self.roles.is_final(node):
            self.gradients.append(node)
            self.bytes += self._in_flight(node)
        elif starts(node) and node in self.roles.early:
            pass  # in self.gathers
        elif starts(node) and when <= self.now:
            self._start(node)
        else:
            self.when[node] = when
            critical = starts(node) or node in self.roles.leads
            bisect.insort(self.ready[critical], (self.turn[node], node), key=lambda row: row[0])
            if not critical:
                self._hold(node, 1)

    def _tell_readers(self, node: fx.Node) -> None:
        pending = [node]
        while pending:
            value = pending.pop()
            for reader in self.roles.readers[value]:
                self.missing[reader] -= 1
                if self.missing[reader]:
                    continue
                if reader in self.roles.lazy and reader.op == "call_function":
                    arrived = max(self.when[x] for x in self.roles.inputs[reader])
                    self.when[reader] = max(arrived, self.when.get(reader, 0.0))
                    pending.append(reader)
                elif reader.op == "call_function":
                    self._offer(reader)

    def _hold(self, node: fx.Node, count: int) -> None:
        """Count what a node that could run keeps alive (1), or no longer does (-1)."""
        for root in {root_of(value) for value in node.all_input_nodes}:
            before = self.held[root] > 0
            self.held[root] += count
            if root.op == "call_function" and before != (self.held[root] > 0):
                self.bytes += count * bytes_of(root)

    def _in_flight(self, start: fx.Node) -> float:
        """Bytes that a final collective keeps alive: what a scatter reads; results leave the graph in any case."""
        return sum(bytes_of(n) for n in start.all_input_nodes) if "reduce_scatter" in str(start.target) else 0.0

    def _choose(self) -> fx.Node | None:
        leading, other = (self._first_free(self.ready[critical]) for critical in (True, False))
        if leading is None and other is None:
            rows = [row for critical in (True, False) for row in self.ready[critical][:_WINDOW]]
            return min(rows, key=lambda row: (self.when[row[1]], row[0]))[1] if rows else None
        if leading is None or other is None:
            return leading or other
        steps_back = self.place[leading] < self.last_start and self.bytes <= self.budget
        return leading if steps_back or self.place[leading] < self.place[other] else other

    def _first_free(self, rows: list[tuple[Turn, fx.Node]]) -> fx.Node | None:
        return next((node for _, node in rows[:_WINDOW] if self.when[node] <= self.now), None)

    def _run(self, node: fx.Node) -> None:
        critical = starts(node) or node in self.roles.leads
        rows = self.ready[critical]
        del rows[bisect.bisect_left(rows, self.turn[node], key=lambda row: row[0])]
        if not critical:
            self._hold(node, -1)
        if starts(node):
            self._start(node)
        else:
            self._pull(node)
            self._tell_readers(node)

    def _pull(self, node: fx.Node) -> None:
        """Put a node into the order, behind everything lazy that it needs."""
        stack = [node]
        while stack:
            top = stack[-1]
            needed = [value for value in self.roles.inputs[top] if value not in self.done]
            stack.extend(reversed(needed))
            if not needed:
                stack.pop()
                if top not in self.done:
                    self._finish(top)

    def _finish(self, node: fx.Node) -> None:
        self.done.add(node)
        if node.op != "output":
            self.order.append(node)
        if is_wait(node):
            self.now = max(self.now, self.when.get(node, 0.0))
            if node.all_input_nodes[0] in self.roles.early:
                self.bytes -= bytes_of(node)
        self.now += self.seconds[node]
        self.computed += self.seconds[node]
        if node not in self.when:
            self.when[node] = 0.0
            if node.op in ("placeholder", "get_attr"):
                self._tell_readers(node)

    def _start(self, start: fx.Node) -> None:
        self._pull(start)
        axis, seconds, _ = self.transfers[start]
        self.free[axis] = max(self.now, self.free[axis]) + seconds
        for wait in start.users:
            self.when[wait] = self.free[axis]
        if self.roles.is_final(start):
            self.unwaited.extend([start] if self._in_flight(start) else ())
        elif start in self.roles.early:
            self.bytes += bytes_of(start)
        self._tell_readers(start)

    def _start_gathers(self, soon: float) -> bool:
        """Start those that are wanted now, or are to start before `soon` (in computed seconds) and fit the budget."""
        found = False
        for rows in self.gathers.values():
            while rows:
                at, start = rows[0]
                fits = self.bytes + bytes_of(start) <= self.budget
                wanted = not found and self._is_wanted(start)
                if not (wanted or (soon > at and fits)):
                    break
                rows.popleft()
                self._start(start)
                found = True
        return found

    def _is_wanted(self, start: fx.Node) -> bool:
        """Whether its reader is the next in line."""
        use = self.roles.first_use[start]
        reader = self.at_place[use]
        if reader in self.roles.leads or starts(reader):
            return not self.ready[True] or self.turn[reader] < self.ready[True][0][0]
        return use < min((self.place[rows[0][1]] for rows in self.ready.values() if rows), default=math.inf)

    def _start_gradients(self) -> None:
        while self.gradients:
            axis = self.transfers[self.gradients[0]][0]
            if self.free[axis] > self.now and self.bytes <= self.budget:
                break
            self._start(self.gradients.popleft())
        while self.bytes > self.budget and self.unwaited:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        start = self.unwaited.popleft()
        for wait in start.users:
            self._pull(wait)
        self.bytes -= self._in_flight(start)
