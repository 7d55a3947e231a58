"""What `explain` returns: everything that was decided, as data, as text and as a page."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy

from spcompile.diagnostics import Remark, SourceLine, remark_lines
from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.durations import ms_text
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import Memory
from spcompile.memory.largest import LargeTensor
from spcompile.plain_text import one_line
from spcompile.report.answers import Answers
from spcompile.report.line_of_depths import Line
from spcompile.report.plan_html import PageContent, page
from spcompile.report.plan_json import as_json
from spcompile.report.step_trace import TRACE_SCHEMA_VERSION, PhaseTrace, chrome_trace, in_order_of_a_step
from spcompile.schedule.communication import Row, Send
from spcompile.schedule.timeline import Event, Prediction

if TYPE_CHECKING:
    from rich.table import Table

_WHY = ("SPR203", "SPR204")  # the choice of attention
_TOLD_FIRST = (*_WHY, "SPR601", "SPR603")  # what is made again, and that a step does not fit
WIDTH = 120


@dataclass(frozen=True)
class PassRow:
    """One run of one pass; those of the SCHEDULE stage run once on each graph."""

    name: str
    stage: str
    phase: str
    rewrites: int
    milliseconds: float


@dataclass(frozen=True)
class AttentionRow:
    """Attentions of one kind: `strategy` is "ring", "ulysses", "hybrid UxR" (Ulysses times ring) or "one device".

    scores: what else happens to the scores, as "softcap 30, ALiBi, sinks, dropout 0.1, dense bias", and whether what
        rows without keys average is found apart; "" if nothing.
    kernel: which computes it on the accelerator of the options, by `choice.TABLE`; "" on a CPU.
    """

    strategy: str
    count: int
    heads: int
    kv_heads: int
    mask: str
    scores: str = ""
    kernel: str = ""


@dataclass(frozen=True)
class Sharding:
    """What is split. sharded_ops, ops: of the global graph; length, local_length: of the sequence, in tokens."""

    order: str
    sharded_ops: int
    ops: int
    length: sympy.Expr | None
    local_length: sympy.Expr | None


@dataclass(frozen=True)
class Folded:
    """Equal layers of which a few were compiled. count: of them; compiled: how many, in each of two programs."""

    count: int
    compiled: tuple[int, int]

    @property
    def line(self) -> Line:
        """Through what the two programs take, at all layers."""
        few, more = self.compiled
        return Line(sympy.Rational(self.count - few, more - few))

    def __str__(self) -> str:
        few, more = self.compiled
        return (
            f"{self.count} equal ones, of which {few} and {more} were compiled. What is saved and sent, and flops, "
            f"follow exactly; peaks, times, and how parameters are bundled, are continued; the schedule is of {more}"
        )


@dataclass
class Plan:
    """The compiled program of one rank, explained. Sizes are sympy expressions: numbers, or of a dynamic length.

    answers: what is told first. symbols: what each symbol is.
    parts: the further graphs of a model that is not one, in order; this is the first.
    graphs: the text after every pass, in order, then "forward" and "backward".
    sends, events: of the final graphs by phase, every collective and what takes time. trace: the same for `save_trace`.
    files: the user's, name -> path.
    folded: equal layers were compiled once: graphs, sends and events are those of few layers. None: all were compiled.
    """

    model: str
    mesh: MeshShape
    options: dict[str, Any]
    sharding: Sharding
    attention: list[AttentionRow]
    collectives: list[Row]
    memory: Memory
    remarks: list[Remark]
    passes: list[PassRow]
    largest_tensors: list[LargeTensor]
    predicted: Prediction
    answers: Answers
    symbols: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict, repr=False)
    sends: dict[str, list[Send]] = field(default_factory=dict, repr=False)
    events: dict[str, list[Event]] = field(default_factory=dict, repr=False)
    trace: list[PhaseTrace] = field(default_factory=list, repr=False)
    files: dict[str, str] = field(default_factory=dict, repr=False)
    parts: list[Plan] = field(default_factory=list, repr=False)
    folded: Folded | None = None

    def graph(self, name: str) -> str:
        """The text of the graph after a pass, or "forward" or "backward": the final ones.

        Raises:
            KeyError: no such graph; names those there are.
        """
        if name not in self.graphs:
            raise KeyError(f"no graph {name!r}; there are: {', '.join(self.graphs)}")
        return self.graphs[name]

    def save(self, path: str) -> None:
        """Write the plan as one HTML page that needs nothing else."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(self._page_content()))

    def save_trace(self, path: str, ranks: int | None = None) -> None:
        """Write the predicted step as a trace that ui.perfetto.dev opens.

        ranks: of the first so many; all do the same. Default: of all.
        """
        memory, phases = self.memory, in_order_of_a_step([self.trace, *(part.trace for part in self.parts)])
        held = int(memory.parameter_bytes + memory.optimizer_bytes)
        about = {"schema_version": TRACE_SCHEMA_VERSION, "model": self.model, "mesh": dict(self.mesh.axes)}
        trace = {
            "traceEvents": chrome_trace(phases, self.mesh, ranks or self.mesh.world_size, held),
            "displayTimeUnit": "ms",
            "otherData": about | {"assumptions": list(self.predicted.assumptions)},
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(trace, file, allow_nan=False, separators=(",", ":"))

    def _page_content(self) -> PageContent:
        first, tables, graphs = self.summary()[1:], self.tables(), dict(self.graphs)
        sends: dict[str, list[Send]] = dict(self.sends)
        events, files = dict(self.events), dict(self.files)
        prefixes: dict[str, str] = {}
        for number, part in enumerate(self.parts, 2):
            first += [f"Part {number}", *part.summary()[1:]]
            prefix = f"part {number}: "
            of_part = [(f"{title} of part {number}", header, rows) for title, header, rows in part.tables()]
            tables += of_part
            prefixes |= dict.fromkeys((title for title, _, _ in of_part), prefix)
            graphs |= {prefix + name: text for name, text in part.graphs.items()}
            sends |= {prefix + name: found for name, found in part.sends.items()}
            events |= {prefix + name: found for name, found in part.events.items()}
            files = part.files | files
        length = self.sharding.length
        return PageContent(
            title=one_line(f"{self.model} on mesh {self.mesh}"),
            first=first,
            tables=tables,
            remarks=[r for plan in (self, *self.parts) for r in plan.remarks if r.code not in _TOLD_FIRST],
            graphs=graphs,
            schedule={row.name for plan in (self, *self.parts) for row in plan.passes if row.stage == "schedule"},
            mesh=self.mesh,
            order=self.sharding.order,
            length=int(length) if length is not None and length.is_Integer else None,
            memory=self.memory,
            sends=sends,
            events=events,
            files=files,
            prefixes=prefixes,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: sizes are ints, or the text of their expression where they depend on a dynamic length."""
        return as_json(self)

    def __str__(self) -> str:
        from rich.console import Console  # where nothing is printed, nothing but torch is needed

        out = io.StringIO()
        console = Console(file=out, width=WIDTH, highlight=False, color_system=None, markup=False, emoji=False)
        for line in self.summary():
            console.print(line, soft_wrap=True)
        for title, header, rows in self.tables():
            console.print()
            console.print(_rich(title, header, rows))
        remarks = self.other_remarks()
        if remarks:
            console.print("\nRemarks")
        for remark in remarks:
            console.print(f"  {remark}", soft_wrap=True)
        count = len(self.parts) + 1
        texts = [f"\nPart {number} of {count}: {part}" for number, part in enumerate(self.parts, 2)]
        return "\n".join([out.getvalue().rstrip(), *map(str.rstrip, texts)]) + "\n"

    def summary(self) -> list[str]:
        """The first lines of the report."""
        sharding = self.sharding
        lines = [one_line(f"{self.model} on mesh {self.mesh}")]
        lines += self.answers.lines(self.memory, self.predicted)
        if sharding.sharded_ops:
            split = f"{sharding.length} tokens"
            if self.mesh.size("cp") > 1:
                split += f", {sharding.local_length} on each rank, {sharding.order} order"
            lines.append(f"Sequence   {split}; {sharding.sharded_ops} of {sharding.ops} ops run on shards")
        else:
            lines.append("Sequence   not sharded")
        if self.folded is not None:
            lines.append(f"Layers     {self.folded}")
        for row in self.attention:
            heads = f"{row.heads} heads, {row.kv_heads} key/value heads, mask {row.mask}"
            heads += f", {row.scores}" if row.scores else ""
            heads += f", kernel {row.kernel}" if row.kernel else ""
            lines.append(f"Attention  {row.count} x {row.strategy}: {heads}")
        why = [f"{r.text}{_at_place(r.where)}" for r in self.remarks if r.code in _WHY]
        lines += [f"Why        {text}" for text in dict.fromkeys(why)]
        lines += [f"Assumed    {text}" for text in self.predicted.assumptions]
        lines += [f"Symbol     {name} is {meaning}" for name, meaning in self.symbols.items()]
        return lines

    def other_remarks(self) -> list[str]:
        """Remarks that the first lines do not tell."""
        return remark_lines(remark for remark in self.remarks if remark.code not in _TOLD_FIRST)

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, column names, rows) of every table of the report; the first column of a row says what it is."""
        memory = self.memory
        kept, alone = memory.saved_activation_bytes, memory.saved_activation_bytes_one_device
        ratio = f", 1/{float(alone / kept):.2f} of that" if kept.is_number and alone.is_number and kept != 0 else ""
        return [
            (
                "Collectives",
                ["op", "axis", "phase", "count", "bytes sent", "origin", "layer", "source"],
                [
                    [r.op, r.axis, r.phase, str(r.count), _sent(r), r.origin, r.layer, _place(r.source)]
                    for r in self.collectives
                ],
            ),
            (
                "Memory of one rank",
                ["what", "bytes"],
                [
                    ["saved for backward, one device", size_text(alone)],
                    ["saved for backward", size_text(kept) + ratio],
                    ["parameters", size_text(memory.parameter_bytes)],
                    ["gradients", size_text(memory.gradient_bytes)],
                    ["optimizer", size_text(memory.optimizer_bytes)],
                    ["transient, at the peak", f"{size_text(memory.transient_bytes)} ({memory.peak_at})"],
                    ["peak, without the optimizer", size_text(memory.peak_bytes)],
                    ["peak of everything", size_text(memory.total_bytes)],
                    ["in the memory of the host", _in_host_memory(memory)],
                ],
            ),
            *_actions_table(memory),
            (
                "Predicted time of one step without the optimizer",
                ["phase", "ms", "compute", "communication", "hidden", "exposed", "bytes sent", "bytes exposed"],
                [
                    [
                        r.phase,
                        *(ms_text(t) for t in (r.seconds, r.compute, r.communication, r.hidden, r.exposed)),
                        *(size_text(sympy.Integer(round(b))) for b in (r.bytes, r.exposed_bytes)),
                    ]
                    for r in self.predicted.phases
                ],
            ),
            (
                "Largest tensors",
                ["name", "count", "phase", "shape", "elements", "dtype", "source"],
                [
                    [
                        r.name,
                        str(r.count),
                        r.phase,
                        f"[{', '.join(map(str, r.shape))}]",
                        str(r.numel),
                        str(r.dtype).removeprefix("torch."),
                        _place(r.source),
                    ]
                    for r in self.largest_tensors
                ],
            ),
            (
                "Passes",
                ["pass", "stage", "graph", "rewrites", "ms"],
                [[r.name, r.stage, r.phase, str(r.rewrites), f"{r.milliseconds:.1f}"] for r in self.passes],
            ),
        ]


def size_text(size: sympy.Expr) -> str:
    """`1.50 MiB`, or the expression of a size that is not known."""
    return bytes_text(float(size)) if size.is_number else str(size)


def _in_host_memory(memory: Memory) -> str:
    if memory.host_bytes == 0:
        return size_text(memory.host_bytes)
    of = f" of {bytes_text(memory.host_limit_bytes)}" if memory.host_limit_bytes else ""
    return f"{size_text(memory.host_bytes)}, on a node {size_text(memory.host_node_bytes)}{of}"


def _actions_table(memory: Memory) -> list[tuple[str, list[str], list[list[str]]]]:
    """What was done to save memory; no table where nothing was."""
    rows = [
        [f"{row.kind} {row.op}", str(row.count), bytes_text(row.bytes), ms_text(row.seconds), _place(row.source)]
        for row in memory.actions
    ]
    return [("Not saved for backward", ["what", "count", "bytes", "ms", "source"], rows)] if rows else []


def _at_place(source: SourceLine | None) -> str:
    return f" (asked for at {_place(source)})" if source else ""


def _sent(row: Row) -> str:
    return f"at most {size_text(row.bytes)}" if row.at_most else size_text(row.bytes)


def _place(source: SourceLine | None) -> str:
    return f"{source.file.rpartition('/')[2]}:{source.line}" if source else ""


def _rich(title: str, header: list[str], rows: Iterable[list[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        numeric = name in ("count", "elements", "rewrites", "ms", "compute", "communication", "hidden", "exposed")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(one_line, row))
    return table
