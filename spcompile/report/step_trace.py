"""The predicted step as a trace in Chrome's JSON format, which ui.perfetto.dev and torch's viewers open.

Of every rank: what compute is at, what is on the way along each axis, what of it compute waits for, and a counter of
memory. Names are those of a profile of the real run: collectives and waits have the ranges of
`spcompile.program.ranges`, other calls the names of their ops, as `aten::mm`. Times are microseconds. Format: "Trace
Event Format" (Google), events X, C and M.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from spcompile.diagnostics import source_of
from spcompile.graph.axes import axis_argument
from spcompile.graph.printer import op_name
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import bytes_alive
from spcompile.program.ranges import range_name
from spcompile.schedule.communication import module_path_of
from spcompile.schedule.op_cost import CostModel
from spcompile.schedule.timeline import COMPUTE, WAITS, Event, RunRecord, starts

TRACE_SCHEMA_VERSION = 1
_STEP = "step"
_NANO = 1e9


@dataclass(frozen=True)
class Slice:
    """What stands in the trace for an event. kind: "compute", "collective", "exposed" or "host copy"."""

    name: str
    kind: str
    stream: str
    start: float
    seconds: float
    about: Mapping[str, Any]


@dataclass(frozen=True)
class PhaseTrace:
    """One final graph of a rank. seconds: until its end; slices: in the order of the graph.

    memory: (seconds, bytes alive from then on), parameters and states of the optimizer aside.
    """

    phase: str
    seconds: float
    slices: tuple[Slice, ...]
    memory: tuple[tuple[float, int], ...]


def phase_trace(phase: str, graphs: Mapping[str, fx.GraphModule], record: RunRecord, cost: CostModel) -> PhaseTrace:
    """From what happened in a run of a final graph."""
    nodes = {node.name: node for node in graphs[phase].graph.nodes}
    ends = [event.start + event.seconds for event in record.events]
    return PhaseTrace(
        phase,
        max([*record.began.values(), *ends], default=0.0),
        tuple(_slices(record.events, nodes)),
        tuple(_levels_in_time(phase, graphs, record, cost)),
    )


def _slices(events: Sequence[Event], nodes: Mapping[str, fx.Node]) -> Iterator[Slice]:
    late = {event.node: event for event in events if event.stream == WAITS}
    for event in events:
        node = nodes[event.node]
        sends = axis_argument(node.target) is not None
        about = _about(node)
        if event.stream == WAITS:
            name = range_name(node, waits=True) if sends else f"wait for {_as_profiled(node)}"
            yield Slice(name, "exposed", COMPUTE, event.start, event.seconds, about)
        elif event.stream == COMPUTE:
            name = range_name(node) if sends else _as_profiled(node)
            yield Slice(name, "compute", COMPUTE, event.start, event.seconds, about)
        elif not sends:
            yield Slice(_as_profiled(node), "host copy", event.stream, event.start, event.seconds, about)
        else:
            exposed = min(event.seconds, late[event.node].seconds) if event.node in late else 0.0
            about |= {"hidden_us": _micro(_NANO * (event.seconds - exposed)), "exposed_us": _micro(_NANO * exposed)}
            stream = event.stream if starts(node) else f"{event.stream}, inside calls"  # what started may be on its way
            yield Slice(range_name(node), "collective", stream, event.start, event.seconds, about)


def _as_profiled(node: fx.Node) -> str:
    return op_name(node).replace(".", "::", 1)


def _about(node: fx.Node) -> dict[str, Any]:
    source = source_of(node)
    found = {"node": node.name, "layer": module_path_of(node)}
    return found | ({"source": f"{source.file}:{source.line}"} if source is not None else {})


def _levels_in_time(
    phase: str, graphs: Mapping[str, fx.GraphModule], record: RunRecord, cost: CostModel
) -> Iterator[tuple[float, int]]:
    """Of calls that start at the same time, the most; only where it changes."""
    order = [node for node in graphs[phase].graph.nodes if node.op != "output"]
    levels: dict[float, int] = {}
    for node, level in zip(order, bytes_alive(phase, graphs, cost.accelerator, cost.fuses), strict=False):
        at = record.began[node]
        levels[at] = max(level, levels.get(at, 0))
    before = -1
    for at, level in levels.items():
        if level != before:
            yield at, level
        before = level


def in_order_of_a_step(parts: Sequence[Sequence[PhaseTrace]]) -> list[PhaseTrace]:
    """Of the graphs of a model that breaks: all forwards, then the backwards from the last to the first."""
    forwards = [phase for part in parts for phase in part if phase.phase != "backward"]
    backwards = [phase for part in reversed(parts) for phase in part if phase.phase == "backward"]
    return forwards + backwards


def chrome_trace(phases: Sequence[PhaseTrace], mesh: MeshShape, ranks: int, held: int) -> list[dict[str, Any]]:
    """The events of the first so many ranks. held: bytes of parameters and states, which are there all the time."""
    streams = dict.fromkeys([_STEP, COMPUTE, *(s.stream for phase in phases for s in phase.slices)])
    threads = {name: number for number, name in enumerate(streams)}
    return [event for rank in range(ranks) for event in _of_rank(phases, mesh, rank, held, threads)]


def _of_rank(
    phases: Iterable[PhaseTrace], mesh: MeshShape, rank: int, held: int, threads: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    place = ", ".join(f"{axis} {number}" for axis, number in _coordinates(mesh, rank).items())
    yield _metadata("process_name", rank, 0, {"name": f"rank {rank}" + (f" ({place})" if place else "")})
    yield _metadata("process_sort_index", rank, 0, {"sort_index": rank})
    for name, number in threads.items():
        yield _metadata("thread_name", rank, number, {"name": name})
        yield _metadata("thread_sort_index", rank, number, {"sort_index": number})
    begin = 0.0
    for phase in phases:
        whole = Slice(phase.phase, "phase", _STEP, 0.0, phase.seconds, {})
        for one in (whole, *phase.slices):
            start, end = (round(_NANO * (begin + at)) for at in (one.start, one.start + one.seconds))
            yield {
                "ph": "X",
                "name": one.name,
                "cat": one.kind,
                "pid": rank,
                "tid": threads[one.stream],
                "ts": _micro(start),
                "dur": _micro(max(0, end - start - 1)),  # readers round: neighbours must not overlap
                "args": dict(one.about),
            }
        for at, level in phase.memory:
            ts = _micro(_NANO * (begin + at))
            yield {"ph": "C", "name": "memory", "pid": rank, "tid": 0, "ts": ts, "args": {"bytes": held + level}}
        begin += phase.seconds


def _micro(nanoseconds: float) -> float:
    return round(nanoseconds) / 1e3


def _metadata(name: str, rank: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": rank, "tid": thread, "ts": 0, "args": args}


def _coordinates(mesh: MeshShape, rank: int) -> dict[str, int]:
    """By axis the place of a rank; the last axis is the innermost."""
    found: dict[str, int] = {}
    for axis, size in reversed(mesh.axes):
        rank, found[axis] = divmod(rank, size)
    return dict(reversed(found.items()))
