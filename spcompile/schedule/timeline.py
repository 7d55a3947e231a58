"""What hides what: the nodes of a final graph, in their order, on one compute stream and one stream for each axis.

A collective starts when the graph gets to it and the axis is free; its wait ends when it has arrived. What compute
waits is exposed, the rest is hidden. Seconds come from `spcompile.schedule.op_cost`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from spcompile.collectives import is_start
from spcompile.collectives.host_copy import HOST_COPIES, WAIT_COPY
from spcompile.machine.links import link_of
from spcompile.schedule.communication import sent_by
from spcompile.schedule.op_cost import CostModel, bytes_of

_c10d = torch.ops._c10d_functional
COMPUTE, WAITS, HOST = "compute", "waits", "host copies"


@dataclass(frozen=True)
class Timeline:
    """One run of a graph. Seconds, and bytes that this rank sends.

    seconds: until the end; compute + exposed + host. communication: on the way, summed over collectives.
    exposed_bytes: of each collective as much as compute waited for it. host: seconds that compute waits for copies to
    the host and back, which are in none of the others but `seconds`.
    """

    phase: str
    seconds: float
    compute: float
    communication: float
    exposed: float
    bytes: float
    exposed_bytes: float
    host: float = 0.0

    @property
    def hidden(self) -> float:
        """Seconds of communication behind compute."""
        return max(0.0, self.communication - self.exposed)


@dataclass(frozen=True)
class Event:
    """What a stream is busy with: COMPUTE, an axis, or HOST; or, on WAITS, what compute stands still for.

    Seconds since the graph began. node: of a wait the node that is waited for.
    """

    node: str
    stream: str
    start: float
    seconds: float


@dataclass
class RunRecord:
    """What happens in a run of a graph.

    late_by: started collective -> seconds that compute waits for it. events: what takes time, in the order of the
    graph. began: node -> seconds until compute gets to it.
    """

    late_by: dict[fx.Node, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    began: dict[fx.Node, float] = field(default_factory=dict)

    def add(self, node: fx.Node, stream: str, start: float, seconds: float) -> None:
        """An event, if it takes time."""
        if seconds > 0:
            self.events.append(Event(node.name, stream, start, seconds))


def starts(node: fx.Node) -> bool:
    """Whether a node starts a collective that a `wait_tensor` ends."""
    return is_start(node.target)


def is_wait(node: fx.Node) -> bool:
    """Whether a node ends a collective."""
    return node.target is _c10d.wait_tensor.default


def timeline(phase: str, nodes: Iterable[fx.Node], cost: CostModel, record: RunRecord | None = None) -> Timeline:
    """Run nodes in this order on the streams. record: is given what happens."""
    record = record if record is not None else RunRecord()
    now = compute = communication = exposed = sent = exposed_bytes = host = 0.0
    free: defaultdict[Any, float] = defaultdict(float)  # axis, or op of a host copy -> when its stream is
    copied: dict[fx.Node, float] = {}  # start of such a copy -> arrival
    flying: dict[fx.Node, tuple[float, float, float]] = {}  # start -> (arrival, seconds, bytes)
    for node in nodes:
        record.began[node] = now
        if starts(node):
            axis, seconds, size = transfer(node, cost)
            free[axis] = max(now, free[axis]) + seconds
            flying[node] = (free[axis], seconds, size)
            communication, sent = communication + seconds, sent + size
            record.add(node, axis, free[axis] - seconds, seconds)
            continue
        if node.target in HOST_COPIES:
            seconds = cost.host_copy(bytes_of(node))
            free[node.target] = max(now, free[node.target]) + seconds
            copied[node] = free[node.target]
            record.add(node, HOST, free[node.target] - seconds, seconds)
            continue
        if node.target is WAIT_COPY:
            late = max(0.0, copied.pop(node.all_input_nodes[0], now) - now)
            record.add(node.all_input_nodes[0], WAITS, now, late)
            host, now = host + late, now + late
            continue
        if is_wait(node):
            arrival, seconds, size = flying.pop(node.all_input_nodes[0], (0.0, 1.0, 0.0))
            late = max(0.0, arrival - now)
            record.late_by[node.all_input_nodes[0]] = late
            record.add(node.all_input_nodes[0], WAITS, now, late)
            exposed_bytes += size * min(1.0, late / seconds)
        else:
            work = cost.work(node)
            late, size = work.exposed, transfer(node, cost)[2] if work.communication else 0.0
            if work.communication > 0:
                record.add(node, transfer(node, cost)[0], now, work.communication)
            record.add(node, COMPUTE, now, work.compute)
            record.add(node, WAITS, now + work.compute, late)
            compute, communication = compute + work.compute, communication + work.communication
            sent, now = sent + size, now + work.compute
            exposed_bytes += size * late / work.communication if size else 0.0
        exposed, now = exposed + late, now + late
    return Timeline(phase, now, compute, communication, exposed, sent, exposed_bytes, host)


def transfer(node: fx.Node, cost: CostModel) -> tuple[str, float, float]:
    """(axis, seconds, bytes) of a collective; nothing for a node that sends none."""
    found = sent_by(node, cost.mesh)
    if found is None:
        return "", 0.0, 0.0
    return found[1], cost.communication(node), cost.bytes_sent(node)


@dataclass(frozen=True)
class Prediction:
    """One step without the optimizer, by the tables. phases: one timeline for each final graph."""

    phases: tuple[Timeline, ...]
    assumptions: tuple[str, ...]

    def total(self, name: str) -> float:
        """The sum of a field of Timeline over the phases."""
        return float(sum(getattr(phase, name) for phase in self.phases))


def records_of(graphs: Mapping[str, fx.GraphModule], cost: CostModel) -> dict[str, RunRecord]:
    """By phase, what each stream of a rank does when; all ranks do the same."""
    found = {phase: RunRecord() for phase in graphs}
    for phase, gm in graphs.items():
        timeline(phase, gm.graph.nodes, cost, found[phase])
    return found


def predict(graphs: Mapping[str, fx.GraphModule], cost: CostModel) -> Prediction:
    """Of final graphs by phase."""
    phases = tuple(timeline(phase, gm.graph.nodes, cost) for phase, gm in graphs.items())
    links = [
        (axis, link_of(cost.mesh, axis, cost.links, own=cost.accelerator.links))
        for axis, size in cost.mesh.axes
        if size > 1
    ]
    return Prediction(
        phases,
        (
            str(cost.accelerator),
            *(f"{axis}: {link.name}, {link.bytes_per_second / 1e9:g} GB/s each way" for axis, link in links),
            "elementwise ops are fused" if cost.fuses else "no ops are fused",
            "what is on its way slows no compute down; sizes that are symbols are those of the example inputs",
        ),
    )
