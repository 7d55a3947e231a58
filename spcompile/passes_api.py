"""What a pass is. The only engine module that the author of a pass must read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch.fx as fx

    from spcompile.diagnostics import Remarks
    from spcompile.machine.mesh import MeshShape
    from spcompile.options import Options


class Stage(Enum):
    """Which graph a pass works on."""

    GLOBAL = "global"  # the user's shapes, one device's meaning; runs as it stands
    LOCAL = "local"  # one rank's shapes; communication is explicit spx collectives
    SCHEDULE = "schedule"  # forward and backward graphs after AOTAutograd


@dataclass
class Context:
    """What a pass may know: nothing in it differs between ranks.

    order: of the sequence over cp; set by choose-attention.
    traced: graphs of calls that SCHEDULE passes have traced, by all that they depend on: layers, and phases, are alike.
    """

    mesh: MeshShape
    options: Options
    remarks: Remarks
    order: str = "contiguous"
    traced: dict[Any, fx.Graph] = field(default_factory=dict, repr=False)


@dataclass
class PassReport:
    """What a pass did. `rewrites == 0` promises that the graph's text is unchanged."""

    rewrites: int = 0
    ops: dict[str, tuple[int, int]] = field(default_factory=dict)  # op -> (count before, count after)
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Example:
    """A program of a few lines on which a pass does its work; golden text, numerics and docs come from it.

    The passes that stand before this one in the pipeline run first (`spcompile.report.example_runs`).
    function: plain tensor code; inputs: makes its float64 and int inputs, afresh at each call.
    mesh: axis sizes for the printed text; numerics run on other sizes too. options: of the backend. fields: of the
    pass, where its defaults leave so small a program alone.
    """

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    mesh: tuple[tuple[str, int], ...] = (("cp", 2),)
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are the options.

    run() changes the graph in place. Every single rewrite preserves meaning. It must be idempotent.
    leaves: the stage of the graph behind the pass, where it is not `stage`.
    axis: the one that the pass is about, if it is about one.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    after: ClassVar[frozenset[str]] = frozenset()
    summary: ClassVar[str] = ""
    axis: ClassVar[str | None] = None
    leaves: ClassVar[Stage | None] = None

    def runs_on(self, mesh: MeshShape) -> bool:
        """Whether there is something to do: more than one rank along the axis of the pass."""
        return self.axis is None or mesh.size(self.axis) > 1

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite `gm.graph`; returns the number of rewrites. Who runs passes writes the module's code behind them."""
        raise NotImplementedError


class OnAxis(NamedTuple):
    """What a pass is called on one axis, the passes it stands behind there, and what it does, in words."""

    name: str
    after: frozenset[str]
    summary: str


@dataclass(frozen=True)
class AxisPass(Pass):
    """A pass that the pipeline holds once for each axis. On `cp` it always runs: a graph is LOCAL behind it."""

    axis: str  # type: ignore[misc]  # of this pass a field, which is no option of the user's

    on: ClassVar[Mapping[str, OnAxis]]

    def __post_init__(self) -> None:
        """Set what a pass of one axis has in its class."""
        for name, value in self.on[self.axis]._asdict().items():
            object.__setattr__(self, name, value)

    def runs_on(self, mesh: MeshShape) -> bool:
        """On every mesh for `cp`."""
        return self.axis == "cp" or super().runs_on(mesh)


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass made of single rewrites, behind each of which the graph is right.

    limit: make at most so many of them, to find the one behind which a result is wrong.
    """

    limit: int | None = None

    def rewrites(self, gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        """Make one rewrite for each step, and yield a node that it made or moved."""
        raise NotImplementedError

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite the graph; returns the number of rewrites."""
        return sum(1 for _ in islice(self.rewrites(gm, ctx), self.limit))


def op_counts(graph: fx.Graph) -> Counter[str]:
    """How often each op occurs."""
    from spcompile.graph.printer import op_name

    return Counter(op_name(n) for n in graph.nodes if n.op == "call_function")


def count_changes(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    """The ops whose number changed."""
    return {op: (before[op], after[op]) for op in sorted({*before, *after}) if before[op] != after[op]}
