"""Runs passes over a graph: orders are checked, every pass is timed and verified, every text kept where asked for."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from spcompile.check.verifier import verify_graph
from spcompile.diagnostics import IllegalOption, IllegalPlugin, InvalidGraph, SpcompileError
from spcompile.graph.edit import copy_module
from spcompile.graph.printer import format_graph
from spcompile.passes_api import Context, Pass, PassReport, Stage, count_changes, op_counts
from spcompile.program.progress import begins
from spcompile.sharding.global_view import states_of_inputs

log = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """The graph after one pass: its text and a copy of the graph itself, where the history keeps them."""

    name: str
    stage: Stage
    text: str
    report: PassReport
    gm: fx.GraphModule | None = None


@dataclass
class History:
    """All snapshots of one compile, in order.

    keep_texts: writing them takes a tenth of the time of all passes, which nobody pays who will not read them.
    keep_graphs: those before autograd; snapshots between which nothing changed share one copy.
    verifies: graphs after each pass. A plan leaves it out: what it proposes is verified when it is compiled.
    """

    snapshots: list[Snapshot] = field(default_factory=list)
    on_snapshot: Callable[[Snapshot], None] | None = None
    keep_graphs: bool = False
    keep_texts: bool = False
    verifies: bool = True
    _copied: list[Any] = field(default_factory=list, repr=False)  # what the last copy was made of

    def add(self, name: str, stage: Stage, gm: fx.GraphModule, ctx: Context, report: PassReport) -> None:
        """Keep what is to be kept of a graph."""
        title = f"stage {stage.value}, mesh {ctx.mesh}, after {name}: {report.rewrites} rewrites"
        kept = self._copy(gm, report) if self.keep_graphs and stage is not Stage.SCHEDULE else None
        text = format_graph(gm, title=title) if self.keep_texts else ""
        snapshot = Snapshot(name, stage, text, report, kept)
        self.snapshots.append(snapshot)
        if self.on_snapshot is not None:
            self.on_snapshot(snapshot)

    def _copy(self, gm: fx.GraphModule, report: PassReport) -> fx.GraphModule | None:
        """A copy of the graph: the last one, if the pass says that it changed nothing, and the calls say so too."""
        calls = [(node, node.target, node.args, node.kwargs) for node in gm.graph.nodes]
        if report.rewrites == 0 and calls == self._copied:
            return self.snapshots[-1].gm
        self._copied = calls
        return copy_module(gm)

    def text(self, name: str) -> str:
        """The last text after the pass `name`, from a history that keeps texts."""
        found = [s.text for s in self.snapshots if s.name == name]
        if not found:
            raise KeyError(f"no graph {name!r}; there are: {', '.join(s.name for s in self.snapshots)}")
        return found[-1]


def configure(passes: Sequence[Pass], chosen: Mapping[str, Any]) -> list[Pass]:
    """The passes with the user's per-pass options: False drops a pass, a dict sets its fields.

    Raises:
        IllegalOption: an unknown pass, or a field a pass does not have.
    """
    by_name = {p.name: p for p in passes}
    for name in chosen:
        if name not in by_name:
            raise IllegalOption(f"passes: no pass {name!r}", legal=", ".join(by_name))
    result = []
    for p in passes:
        wish = chosen.get(p.name, True)
        if wish is False:
            continue
        if isinstance(wish, Mapping):
            legal = [f.name for f in dataclasses.fields(p) if f.name != "axis"]
            unknown = sorted(set(wish) - set(legal))
            if unknown:
                raise IllegalOption(f"passes: {p.name} has no option {unknown[0]!r}", legal=", ".join(legal) or "none")
            p = dataclasses.replace(p, **wish)
        result.append(p)
    return result


def check_order(passes: Iterable[Pass]) -> None:
    """Assert that every pass stands behind those it names in `after` (as far as they are in the pipeline)."""
    passes = list(passes)
    names = [p.name for p in passes]
    for index, p in enumerate(passes):
        late = [name for name in p.after if name in names[index:]]
        assert not late, f"{p.name} must run after {', '.join(late)}"


def _trainable(gm: fx.GraphModule) -> list[str]:
    return [n.name for n in gm.graph.nodes if n.op == "placeholder" and n.meta.get("trainable")]


def _belongs_here(p: Pass) -> bool:
    return type(p).__module__.partition(".")[0] == "spcompile"


def _run_from_outside(p: Pass, gm: fx.GraphModule, ctx: Context) -> int:
    before = format_graph(gm)
    try:
        rewrites = p.run(gm, ctx)
        after = format_graph(gm)
    except SpcompileError:
        raise
    except Exception as error:
        raise IllegalPlugin(f"pass {p.name} of {type(p).__module__} failed: {type(error).__name__}: {error}") from error
    is_count = isinstance(rewrites, int) and not isinstance(rewrites, bool) and rewrites >= 0
    if not is_count or (rewrites == 0 and before != after):
        changed = "the graph has changed" if before != after else "the graph is as it was"
        found = f"pass {p.name} of {type(p).__module__} returns {rewrites!r} as its number of rewrites, and {changed}"
        raise IllegalPlugin(found, legal="how many rewrites it made; 0 for none, and only then")
    return rewrites


def run_passes(gm: fx.GraphModule, passes: Iterable[Pass], ctx: Context, history: History) -> None:
    """Run passes of one stage in order, and verify the graph after each. The module's code is left as it was.

    Raises:
        InvalidGraph: a pass left a graph that breaks a law; names the pass.
        IllegalPlugin: a pass of a plugin failed, or counts its rewrites wrongly.
    """
    after = op_counts(gm.graph)
    for p in passes:
        before = after
        begins(p.name)
        start = time.perf_counter()
        rewrites = p.run(gm, ctx) if _belongs_here(p) else _run_from_outside(p, gm, ctx)
        after = op_counts(gm.graph)
        report = PassReport(rewrites, count_changes(before, after))
        report.milliseconds = (time.perf_counter() - start) * 1e3
        stage = p.leaves or p.stage
        if history.verifies:
            _verify(gm, stage, ctx, p)
        log.debug("%s: %d rewrites, %.1f ms%s", p.name, rewrites, report.milliseconds, _changes_text(report))
        history.add(p.name, stage, gm, ctx, report)


def _verify(gm: fx.GraphModule, stage: Stage, ctx: Context, p: Pass) -> None:
    try:
        verify_graph(
            gm,
            stage,
            ctx.mesh,
            sharded_outputs=ctx.options.outputs == "sharded",
            input_states=states_of_inputs(gm.graph),
            trainable=_trainable(gm),
        )
    except InvalidGraph as error:
        raise InvalidGraph(f"after pass {p.name}: {error.found}", where=error.where, legal=error.legal) from error


def _changes_text(report: PassReport) -> str:
    return "".join(f"; {op} {before} -> {after}" for op, (before, after) in report.ops.items())
