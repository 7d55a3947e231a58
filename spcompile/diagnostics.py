"""Errors (SP...) and remarks (SPR...): one class or one row each, with a stable code and a text that says what to do.

An error stops the compile, with the same text on every rank. A remark tells what the compiler did where a user might
have expected something else; under `strict=True` it becomes an error. docs/errors.md is generated from this file,
and from report/error_texts.py and remark_texts.py, which have a cause, an example and a cure for each.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from spcompile.plain_text import one_line, some_lines

if TYPE_CHECKING:
    import torch.fx as fx

PACKAGE_FOLDER = os.path.dirname(os.path.abspath(__file__))
_TORCH_FUNC = re.compile(r"[/\\]torch[/\\](_functorch|func|autograd)[/\\]")


@dataclass(frozen=True)
class SourceLine:
    """The user's line that made a node. File, function and text are as `one_line` shows them."""

    file: str
    line: int
    function: str
    text: str

    def __post_init__(self) -> None:
        for name in ("file", "function", "text"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}" + (f"\n      {self.text}" if self.text else "")


# The line of text is missing where Python has none, as for code that was made by exec.
_FRAME = re.compile(
    r'^[ \t]*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>[^\n]+)'
    r'(?:\n(?![ \t]*File ")(?P<text>[^\n]*))?',
    re.MULTILINE,
)


def is_own_file(file: str) -> bool:
    """Whether a file is this package's own; the models that come along are a user's."""
    folder, models = os.path.join(PACKAGE_FOLDER, ""), os.path.join(PACKAGE_FOLDER, "models", "")
    return file.startswith(folder) and not file.startswith(models)


def _is_inside(file: str) -> bool:
    """Whether a file is ours, or how torch.func does what the user calls."""
    return is_own_file(file) or _TORCH_FUNC.search(file) is not None


def source_of(node: fx.Node) -> SourceLine | None:
    """The innermost user frame of the node's stack trace; None for placeholders, outputs and code that has no lines.

    Dynamo leaves out frames whose source it cannot read, as those of exec. What then is left are frames of this
    package, which called the model.
    """
    trace = node.meta.get("stack_trace")
    return _innermost(trace) if isinstance(trace, str) else None


@functools.lru_cache(maxsize=4096)
def _innermost(trace: str) -> SourceLine | None:
    frames = [frame for frame in _FRAME.finditer(trace) if not _is_inside(frame["file"])]
    if not frames:
        return None
    last = frames[-1]
    return SourceLine(last["file"], int(last["line"]), last["function"], (last["text"] or "").strip())


class SpcompileError(Exception):
    """Base of all errors a user can cause. `code` is stable; `legal` says what would have been accepted."""

    code: ClassVar[str] = "SP000"
    title: ClassVar[str] = "error"

    def __init__(self, found: str, *, where: SourceLine | str | None = None, legal: str | None = None) -> None:
        found, legal = some_lines(found), some_lines(legal) if legal is not None else None
        where = one_line(where) if isinstance(where, str) else where
        self.found, self.where, self.legal = found, where, legal
        lines = [f"{self.code} {self.title}: {found}"]
        if where is not None:
            lines.append(f"  at {where}")
        if legal is not None:
            lines.append(f"  legal: {legal}")
        super().__init__("\n".join(lines))


class UnknownOption(SpcompileError, ValueError):
    """An option that does not exist."""

    code, title = "SP101", "unknown option"


class IllegalOption(SpcompileError, ValueError):
    """An option with a value it cannot have."""

    code, title = "SP102", "illegal option value"


class IllegalMesh(SpcompileError, ValueError):
    """A mesh with unknown axis names, or one that does not fit the world."""

    code, title = "SP103", "illegal mesh"


class NoProcessGroup(SpcompileError, RuntimeError):
    """More than one rank was launched but torch.distributed is not initialised."""

    code, title = "SP104", "no process group"


class IllegalModel(SpcompileError, ValueError):
    """A model, its config or its checkpoint that does not exist, is damaged, or cannot have these settings."""

    code, title = "SP105", "illegal model"


class OutOfMemory(SpcompileError, RuntimeError):
    """A step does not fit into the memory that it may take, whatever is made again instead of saved."""

    code, title = "SP106", "a step does not fit"


class IllegalPlugin(SpcompileError, ValueError):
    """A plugin that cannot be imported, a pass of it that cannot stand where it is to, or code of it that fails."""

    code, title = "SP107", "illegal plugin"


class HostMemoryExceeded(SpcompileError, RuntimeError):
    """A step fits only with more values in the host's memory than the ranks of a node may keep there."""

    code, title = "SP108", "host memory exceeded"


class RanksDisagree(SpcompileError, RuntimeError):
    """Ranks do not do the same: other options, graphs, inputs, parameters or versions, or another order of calls."""

    code, title = "SP201", "ranks disagree"


class RanksMissing(SpcompileError, RuntimeError):
    """Ranks did not come to a call, or the backward of one, that others waited in until the timeout."""

    code, title = "SP202", "ranks are missing"


class TwoThreads(SpcompileError, RuntimeError):
    """Two threads of a rank called compiled models at the same time: their collectives would meet each other's."""

    code, title = "SP203", "called from two threads"


class ForkedChild(SpcompileError, RuntimeError):
    """A compiled model was called in a child that was forked from a rank: it has none of the rank's connections."""

    code, title = "SP204", "called in a forked process"


class GraphBreak(SpcompileError, RuntimeError):
    """Dynamo split the model into several graphs: what crosses between two is not sharded. See `on_graph_break`."""

    code, title = "SP301", "the model is not one graph"


class CaptureFailed(SpcompileError, RuntimeError):
    """The graph has an operation that cannot be captured as a pure ATen graph."""

    code, title = "SP302", "cannot capture"


class UnknownFlexAttention(SpcompileError, RuntimeError):
    """A FlexAttention call whose score_mod or mask_mod means nothing that can be computed on shards."""

    code, title = "SP303", "FlexAttention with unknown mods"


class BatchNotSplit(SpcompileError, RuntimeError):
    """The entries of the batch cannot be told apart, so that ranks of dp could not each compute their own."""

    code, title = "SP304", "the batch cannot be split over dp"


class RunsUncompiled(SpcompileError, RuntimeError):
    """A call ran as plain code where that is wrong: over dp, with a part of the batch in the place of the whole."""

    code, title = "SP305", "ran uncompiled"


class StrictRemark(SpcompileError, RuntimeError):
    """A remark, raised since `strict=True`."""

    code, title = "SP401", "not allowed under strict"


class NotComputed(SpcompileError, RuntimeError):
    """An output was read that outputs="loss" does not compute."""

    code, title = "SP402", "output not computed"


class ChangedBuffer(SpcompileError, RuntimeError):
    """A buffer that holds a mask was written to after the model was compiled; torch.compiler.reset() compiles anew."""

    code, title = "SP403", "a buffer changed"


class InvalidGraph(SpcompileError, AssertionError):
    """The verifier found a graph that breaks a law: always a bug of spcompile or of a custom pass."""

    code, title = "SP901", "invalid graph"


REMARKS: dict[str, str] = {
    "SPR101": "neither attention nor other mixing of rows was found: the graph runs replicated",
    "SPR102": "an op has no sharding rule: it is computed replicated on every rank",
    "SPR103": "an op cannot be computed on a shard of the sequence: its input is gathered",
    "SPR104": "no symbol for the number of batch entries goes through the compiler: each number is another program",
    "SPR105": "the model is not one graph: each part is sharded on its own, and what crosses between two is whole",
    "SPR107": "an op mixes entries of the batch: those of all ranks of dp are gathered, and every rank computes it",
    "SPR108": "an op mixes positions of the sequence: another dim is split meanwhile, by all-to-alls there and back",
    "SPR109": "there is no attention: the sequence is the rows that projections treat alike and others mix",
    "SPR201": "a mask could not be read: it stays dense, sharded by query rows",
    "SPR202": "an attention could not be recognised: its keys and values are gathered",
    "SPR203": "attention strategy chosen",
    "SPR204": "the attention strategy that was asked for does not fit, another was taken",
    "SPR205": "the all-to-alls of Ulysses are split into messages that hide behind compute",
    "SPR206": "products beside a collective do not run on symmetric memory, as was asked for",
    "SPR207": "the integers of a mask are taken to be 0 and 1, as it multiplies them with a large number",
    "SPR208": "logits are built, which a loss could do without: somebody else reads them",
    "SPR301": "query length 1 (decoding): the graph runs replicated",
    "SPR302": "random numbers are drawn for the whole tensor on every rank, so that they equal one device's",
    "SPR303": "dropout of attention weights follows from seeds and positions: equal on any number of ranks",
    "SPR501": "an op needs whole what tensor parallelism has split: it is gathered, or becomes rows first",
    "SPR502": "a weight is held whole by every rank of tp",
    "SPR503": "heads do not divide by tp: some ranks compute padding, or key/value heads are replicated",
    "SPR504": "a parameter that is split over tp is gathered: this graph wants it whole, or split otherwise",
    "SPR505": "weights stay whole on every rank of tp unless the model is parallelized: what that costs",
    "SPR601": "values are made again in the backward instead of saved: what that wins and costs",
    "SPR602": "no blocks that repeat were found: what can be made again without reaching far back is",
    "SPR603": "a step does not fit into memory",
    "SPR604": "saved values are in the host's memory until the backward: how many bytes, on a rank and on a node",
    "SPR606": "wide row-wise parts, as an MLP between two norms, run over tiles of rows: what that wins and costs",
    "SPR607": "groups of heads are projected, sent and used one after the other: what that wins and costs",
    "SPR605": "the host's memory does not hold what a step would keep there",
    "SPR401": "world size 1: compiled without sharding",
    "SPR402": "world size 1: the graph cannot be captured, so attention and masks stay as they are",
    "SPR403": "a call ran uncompiled: every rank computes and keeps all of it",
}


PLACES = 6  # lines that are shown of remarks that say the same


@dataclass(frozen=True)
class Remark:
    """One decision worth knowing about, of one line. `strict_error` is False for pure information.

    values: the nodes of the graph that it is about, one for each layer that the line is part of. without_name: how many
    there are besides, in layers that were not compiled since they are equal.
    """

    code: str
    text: str
    where: SourceLine | None = None
    strict_error: bool = True
    values: tuple[str, ...] = ()
    without_name: int = 0

    def __post_init__(self) -> None:
        assert self.code in REMARKS, self.code
        object.__setattr__(self, "text", some_lines(self.text))

    def __str__(self) -> str:
        place = f"\n  at {self.where}" if self.where else ""
        return f"{self.code} {self.text}{place}"

    def to_dict(self) -> dict[str, Any]:
        where = self.where
        source = {"file": where.file, "line": where.line, "text": where.text} if where else None
        return {"code": self.code, "text": self.text, "values": list(self.values), "source": source}


def remark_lines(remarks: Iterable[Remark]) -> list[str]:
    """Remarks as people read them: those that say the same of several values or lines are one, with their places."""
    groups: dict[tuple[str, str], list[Remark]] = {}
    for remark in remarks:
        groups.setdefault((remark.code, remark.text), []).append(remark)
    return [_as_one(group) for group in groups.values()]


def _as_one(group: list[Remark]) -> str:
    times = sum(max(1, len(remark.values)) + remark.without_name for remark in group)
    places = [f"\n  at {place}" for place in dict.fromkeys(remark.where for remark in group) if place is not None]
    more = f"\n  and at {len(places) - PLACES} other lines" if len(places) > PLACES else ""
    count = f" ({times} times)" if times > 1 else ""
    return f"{group[0].code} {group[0].text}{count}{''.join(places[:PLACES])}{more}"


@dataclass
class Remarks:
    """The remarks of one compile, in order, one for each text and line."""

    strict: bool = False
    rows: list[Remark] = field(default_factory=list)

    def add(
        self,
        code: str,
        text: str,
        node: fx.Node | None = None,
        *,
        value: str | None = None,
        where: SourceLine | None = None,
        strict_error: bool = True,
    ) -> None:
        """Record a remark about `node`, or about a line.

        text: the same for all layers, so without names of nodes. value: the name of what it is about, by default of
        `node`.

        Raises:
            StrictRemark: if the compile is strict and the remark tells of a loss, not only of a choice.
        """
        where = source_of(node) if node is not None else where
        value = value or (node.name if node is not None else None)
        remark = Remark(code, text, where, strict_error, () if value is None else (value,))
        if self.strict and strict_error:
            raise StrictRemark(f"{code} {text}", where=where)
        for place, known in enumerate(self.rows):
            if (known.code, known.text, known.where) == (code, remark.text, where):
                self.rows[place] = replace(known, values=tuple(dict.fromkeys((*known.values, *remark.values))))
                return
        self.rows.append(remark)
