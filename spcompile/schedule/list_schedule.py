"""The order of a final graph in which communication hides behind compute: a list scheduler with a simulated clock.

Compute keeps the order that autograd gave, with these exceptions. A collective starts as soon as its operand is there.
What only moves or waits (views, copies, waits, and what is cheap to make from inputs) stands right before its first
reader; a sum of what others make does not, which would keep that alive. Compute that no later collective depends on,
such as products that give gradients of weights, steps back for compute that one depends on, and runs while that is on
its way (as Zheng et al. 2022, Alpa, section 6, and Inductor's overlap scheduling). Of compute that collectives depend
on, what the first of them needs goes first: q is projected, rotated and sent before k is projected. A gather of inputs
starts so long before its use that the table says it arrives. Gradients travel when their axis has nothing better to do,
and are waited for at the end; where nothing may be kept alive, those that become larger travel then. While a message is
on its way, compute that stands further behind may run, such as of a layer that is made again. All this keeps alive a
bounded number of bytes; each node is looked at a few times at most.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

import torch.fx as fx

from spcompile.graph.storage import root_of
from spcompile.schedule.node_roles import Roles, grows
from spcompile.schedule.op_cost import CostModel, bytes_of, readers_of
from spcompile.schedule.timeline import is_wait, starts, transfer

_WINDOW = 16  # how many nodes that could run are looked at
Turn = tuple[int, int]  # the place of the first collective that a node leads to, or its own; its own
PLACE = "spx_place"  # in meta: where autograd put a node, so that a second run finds the same order


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
        self.leading = deque(n for n in self.nodes if self._keeps_its_turn(n))
        self.early_values: list[tuple[int, int]] = []  # (place, bytes) of what ran before its turn, by place
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

    def _keeps_its_turn(self, node: fx.Node) -> bool:
        if node in self.roles.lazy:
            return False
        return self._is_critical(node) if starts(node) else node in self.roles.leads

    def _next_in_turn(self) -> fx.Node | None:
        """Of what collectives depend on, and of those themselves, the first that has not run."""
        while self.leading and self.leading[0] in self.done:
            self.leading.popleft()
        while self.early_values and (not self.leading or self.early_values[0][0] < self.place[self.leading[0]]):
            self.bytes -= heapq.heappop(self.early_values)[1]
        return self.leading[0] if self.leading else None

    def _kept_alive(self, node: fx.Node) -> int:
        """Bytes that a node adds if it runs before its turn: its result's, less those of what it reads last."""
        first = self._next_in_turn()
        if first is None or self.place[node] <= self.place[first]:
            return 0
        read = {root_of(value) for value in node.all_input_nodes}
        gone = [root for root in read if root.op == "call_function" and self._is_read_last_by(node, root)]
        added = bytes_of(node) if root_of(node) is node else 0
        return max(0, added - sum(map(bytes_of, gone)))

    def _is_read_last_by(self, node: fx.Node, root: fx.Node) -> bool:
        return all(reader is node or reader in self.done for reader in readers_of(root))

    def _is_too_early(self, node: fx.Node) -> bool:
        kept = self._kept_alive(node)
        return kept > 0 and self.bytes + kept > self.budget

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
            if self.budget or not grows(node):  # else at the end
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
            rows = [row for critical in (True, False) for row in self._at_hand(self.ready[critical])]
            first = self._next_in_turn()
            if first is not None and not self.missing[first]:
                rows.append((self.turn[first], first))
            return min(rows, key=lambda row: (self.when[row[1]], row[0]))[1] if rows else None
        if leading is None or other is None:
            return leading or other
        steps_back = self.place[leading] < self.last_start and self.bytes <= self.budget
        return leading if steps_back or self.place[leading] < self.place[other] else other

    def _first_free(self, rows: list[tuple[Turn, fx.Node]]) -> fx.Node | None:
        return next((node for _, node in self._at_hand(rows) if self.when[node] <= self.now), None)

    def _at_hand(self, rows: list[tuple[Turn, fx.Node]]) -> Iterator[tuple[Turn, fx.Node]]:
        return (row for row in rows[:_WINDOW] if not self._is_too_early(row[1]))

    def _run(self, node: fx.Node) -> None:
        critical = starts(node) or node in self.roles.leads
        rows = self.ready[critical]
        del rows[bisect.bisect_left(rows, self.turn[node], key=lambda row: row[0])]
        if not critical:
            self._hold(node, -1)
        elif kept := self._kept_alive(node):
            heapq.heappush(self.early_values, (self.place[node], kept))
            self.bytes += kept
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
            first, rows = self._next_in_turn(), self.ready[True]
            return first is None or use <= self.place[first] or bool(rows and self.turn[reader] < rows[0][0])
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
