"""Compiles candidates at two small depths, several processes at once, and says what each takes at full depth."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.capture.meta_device import off_meta
from spcompile.capture.retrace import capture
from spcompile.diagnostics import IllegalModel, SpcompileError
from spcompile.graph.edit import copy_module
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.ladder import HOST, Kind
from spcompile.memory.planner import ROOM, Wish
from spcompile.options import Options
from spcompile.passes_api import Pass
from spcompile.planning.candidates import Candidate, Heads
from spcompile.planning.equal_blocks import find_equal_blocks, shortened
from spcompile.planning.figures import Figures, between, extrapolated
from spcompile.planning.short_step import Short, ShortStep, forward_flops, problems_of, short_step, split_of_parameters
from spcompile.program.build import build_captured
from spcompile.program.progress import begins, shown_by

_TRIED_RUNGS = 3  # beside the one on which nothing is made again, where the least is looked for
MORE = 2  # blocks by which the two programs of a candidate differ: buckets of gradients often hold two


@dataclass(frozen=True)
class Result:
    """A candidate at full depth. again: kinds of values that are made again, as `op of file:line`.

    fits: whether it stays within the limit. budget: what must be asked for instead of the limit for it to do so.
    error: why it could not be compiled; there are no figures then.
    """

    candidate: Candidate
    figures: Figures | None
    again: tuple[str, ...] = ()
    fits: bool = False
    budget: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Depths:
    """A model at the depths at which it is compiled. count: of equal blocks that the model has; shorts: one or two.

    heads: what all attentions allow. splits: of parameters over tp, by mesh, as far as they are known.
    """

    shorts: tuple[Short, ...]
    count: int
    heads: Heads
    splits: dict[tuple[tuple[str, int], ...], dict[str, int | str]] = field(default_factory=dict)

    @property
    def is_extrapolated(self) -> bool:
        """Whether figures are those of fewer blocks, continued."""
        return len(self.shorts) > 1


def depths_of(
    gm: fx.GraphModule, inputs: Sequence[Any], own: Sequence[bool], options: Options, pipeline: Sequence[Pass]
) -> Depths:
    """Capture a Dynamo graph once, and leave out all but a few of its equal blocks.

    own: of each input whether it is a parameter of the model.

    Raises:
        IllegalModel: it has no attention, so no length.
    """
    begins("reading the graph")
    gm, inputs = off_meta(gm, inputs)
    captured = capture(gm, inputs)
    found = find_equal_blocks(captured.graph, ACCELERATORS[options.accelerator])
    if found is None or found.count <= found.least + MORE:
        whole = _short(captured, inputs, own, 0, options, pipeline)
        return Depths((whole[0],), 0, whole[1])
    shorts = []
    for keep in (found.least, found.least + MORE):
        short, kept = shortened(captured, inputs, found, keep)
        shorts.append(_short(short, [inputs[i] for i in kept], [own[i] for i in kept], keep, options, pipeline))
    return Depths(tuple(short for short, _ in shorts), found.count, shorts[0][1])


def _short(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    own: Sequence[bool],
    blocks: int,
    options: Options,
    pipeline: Sequence[Pass],
) -> tuple[Short, Heads]:
    serial = [p for p in pipeline if p.axis is None]
    plain = replace(options, passes={}, attention="auto")
    graph = build_captured(copy_module(captured), inputs, MeshShape(()), plain, serial).gm.graph
    calls = [AttentionCall.of(node).sizes.hints() for node in AttentionCall.all_in(graph)]
    if not calls:
        raise IllegalModel("no attention was found in it, so no length to split", legal="a transformer")
    heads = Heads(tuple(sorted({c.heads for c in calls})), min(c.q_rows for c in calls), max(c.batch for c in calls))
    return Short(captured, list(inputs), tuple(own), blocks, forward_flops(graph), problems_of(graph)), heads


def evaluate(depths: Depths, candidate: Candidate, options: Options, pipeline: Sequence[Pass]) -> Result:
    """One candidate at full depth: the least that has to be made again for it to fit."""
    try:
        steps = steps_of(depths, candidate, options, pipeline)
        return _at_full_depth(depths, candidate, steps, Wish.of(options, candidate.ranks))
    except SpcompileError as error:
        return Result(candidate, None, error=str(error))


def steps_of(depths: Depths, candidate: Candidate, options: Options, pipeline: Sequence[Pass]) -> list[ShortStep]:
    """A candidate's step at each depth.

    Raises:
        SpcompileError: it cannot be compiled.
    """
    chosen = replace(options, **{**candidate.options, "passes": _all_passes(options, candidate)})
    split = _split(depths, candidate.mesh, options, pipeline)
    return [short_step(short, candidate, split, chosen, pipeline) for short in depths.shorts]


def at_rung(depths: Depths, candidate: Candidate, steps: Sequence[ShortStep], rung: int) -> Result:
    """A candidate at full depth with so many kinds of values made again, the cheapest first."""
    return Result(candidate, _figures(depths, steps, rung), _names(steps[0], rung))


@dataclass(frozen=True)
class BothEnds:
    """A candidate at each depth: with nothing made again, and with the kinds of values with which least is alive."""

    nothing: tuple[Figures, ...]
    least: tuple[Figures, ...]
    kinds: tuple[Kind, ...]


def at_both_ends(
    known: Mapping[Candidate, tuple[Kind, ...]],
    depths: Depths,
    candidate: Candidate,
    options: Options,
    pipeline: Sequence[Pass],
) -> BothEnds | str:
    """Figures of both, or why there are none. known: which kinds are made again, where it was decided before."""
    try:
        steps = steps_of(depths, candidate, options, pipeline)
    except SpcompileError as error:
        return str(error)
    kinds = known[candidate] if candidate in known else _kinds_of_least(depths, steps)
    limited = [step.with_kinds(kinds) for step in steps]
    nothing = tuple(step.figures(0) for step in steps)
    return BothEnds(nothing, tuple(step.figures(len(kinds)) for step in limited) if kinds else nothing, kinds)


def _kinds_of_least(depths: Depths, steps: Sequence[ShortStep]) -> tuple[Kind, ...]:
    """The kinds of values to make again for least to be alive: of a few numbers of kinds, by the final graphs.

    More is not always less: what is made again is alive as well. One of them is the best by the joint graphs.
    """
    ladder, rungs = steps[0].ladder, _rungs(steps, Wish())
    if ladder is None:
        return ()
    planned = min(rungs, key=lambda rung: _planned_bytes(depths, steps, rung))
    tried = sorted({planned, *(rungs[(len(rungs) - 1) * part // _TRIED_RUNGS] for part in range(_TRIED_RUNGS + 1))})
    return ladder.kinds[: min(tried, key=lambda rung: _figures(depths, steps, rung).total)]


def _split(
    depths: Depths, mesh: tuple[tuple[str, int], ...], options: Options, pipeline: Sequence[Pass]
) -> dict[str, int | str]:
    if mesh not in depths.splits:
        depths.splits[mesh] = split_of_parameters(depths.shorts[-1], MeshShape(mesh), options, pipeline)
    return depths.splits[mesh]


def _all_passes(options: Options, candidate: Candidate) -> dict[str, Any]:
    return {**options.passes, **candidate.options.get("passes", {})}


def _at_full_depth(depths: Depths, candidate: Candidate, steps: Sequence[ShortStep], wish: Wish) -> Result:
    """The step as it is planned: all trades of the cheaper kinds, and of the last kind as many as are needed.

    Where no trades are enough, as much waits in the memory of the host as is needed.
    """
    rungs = _rungs(steps, wish)
    start = _first_that_fits(depths, steps, rungs, wish)
    if start == 0 or wish.bytes is None:
        figures = _figures(depths, steps, rungs[start])
        if _stays_within(figures, wish) or start == len(rungs) - 1:
            return Result(candidate, figures, _names(steps[0], rungs[start]), _stays_within(figures, wish))
    assert wish.bytes is not None
    before = _figures(depths, steps, rungs[start - 1]) if start else figures
    for at in range(max(start, 1), len(rungs)):
        after = _figures(depths, steps, rungs[at])
        planned = [_planned_bytes(depths, steps, number) for number in rungs[at - 1 : at + 1]]
        wanted = max(0.0, planned[0] - ROOM * wish.bytes)
        part = between(before, after, min(1.0, wanted / max(1.0, planned[0] - planned[1])))
        for figures, budget in ((part, None), (after, int(planned[1] / ROOM) + 1)):
            if _stays_within(figures, wish):
                return Result(candidate, figures, _names(steps[0], rungs[at]), True, budget=budget)
        before = after
    return Result(candidate, before, _names(steps[0], rungs[-1]), False)


def _stays_within(figures: Figures, wish: Wish) -> bool:
    return wish.bytes is None or (figures.total <= wish.bytes and figures.host <= wish.host)


def _figures(depths: Depths, steps: Sequence[ShortStep], rung: int) -> Figures:
    found = [step.figures(rung) for step in steps]
    return found[0] if len(found) == 1 else extrapolated(found[0], found[1], _blocks(depths), depths.count)


def _rungs(steps: Sequence[ShortStep], wish: Wish) -> list[int]:
    """Rungs that mean the same at all depths: all, if layers offer the same trades in the same order, else the ends."""
    ladders = [step.ladder for step in steps if step.ladder is not None]
    if not ladders:
        return [0]
    kinds = [ladder.kinds for ladder in ladders]
    most = min(len(found) for found in kinds)
    same = next((n for n in range(most) if len({found[n] for found in kinds}) > 1), most)
    return [*range(same + 1), *([HOST] if wish.host and wish.bytes is not None else [])]


def _first_that_fits(depths: Depths, steps: Sequence[ShortStep], rungs: Sequence[int], wish: Wish) -> int:
    """Its place among `rungs`, by what is alive in the joint graphs, as the compiler itself plans."""
    if wish.bytes is None and not wish.least:
        return 0
    planned: list[float] = []
    for at, rung in enumerate(rungs):
        planned.append(_planned_bytes(depths, steps, rung))
        if wish.bytes is not None and planned[-1] <= ROOM * wish.bytes:
            return at
    return planned.index(min(planned))


def _planned_bytes(depths: Depths, steps: Sequence[ShortStep], rung: int) -> float:
    ladders = [step.ladder for step in steps if step.ladder is not None]
    rows = [(ladder.state_bytes, *ladder.peaks(rung)) for ladder in ladders]
    if not rows:
        return 0.0
    if len(rows) > 1:
        few, more = _blocks(depths)
        steps_up = (depths.count - few) / (more - few)
        state, *peaks = (a + (b - a) * steps_up for a, b in zip(*rows, strict=True))
        return float(state + max(peaks))
    state, *peaks = rows[0]
    return float(state + max(peaks))


def _blocks(depths: Depths) -> tuple[int, int]:
    return depths.shorts[0].blocks, depths.shorts[1].blocks


def _names(step: ShortStep, rung: int) -> tuple[str, ...]:
    if step.ladder is None:
        return ()
    found = []
    for op, source in step.ladder.kinds if rung == HOST else step.ladder.kinds[:rung]:
        place = f" of {source.file.rpartition('/')[2]}:{source.line}" if source is not None else ""
        found.append(f"{op.partition('.')[0]}{place}")
    return tuple(dict.fromkeys(found))


Task = Callable[[Depths, Candidate, Options, Sequence[Pass]], Any]


@dataclass
class Evaluator:
    """Evaluates candidates in worker processes, forked when the model has been read, or one after the other here.

    Forking shares what was captured. It is not done where this process uses CUDA, which a child cannot.
    task: what is found of each, `evaluate` if nothing else is said.
    """

    depths: Depths
    options: Options
    pipeline: Sequence[Pass]
    workers: int
    task: Task = evaluate
    done: int = 0
    _pool: ProcessPoolExecutor | None = field(default=None, repr=False)

    @contextmanager
    def running(self) -> Iterator[Evaluator]:
        """With its workers."""
        if self.workers < 2 or torch.cuda.is_initialized() or "fork" not in multiprocessing.get_all_start_methods():
            yield self
            return
        gc.freeze()  # what is shared stays shared
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(self.workers, context, _start_worker, (self,)) as pool:
            self._pool = pool
            try:
                yield self
            finally:
                self._pool = None
                gc.unfreeze()

    def results(self, candidates: Iterable[Candidate]) -> list[Any]:
        """What the task finds of all candidates, in their order."""
        wanted = list(candidates)
        total = self.done + len(wanted)
        if self._pool is None:
            found = []
            for one in wanted:
                self._tell(total)
                with shown_by(lambda what: None):
                    found.append(self.task(self.depths, one, self.options, self.pipeline))
                self.done += 1
            return found
        futures: list[Future[Any]] = [self._pool.submit(_evaluate_here, one) for one in wanted]
        pending = set(futures)
        self._tell(total)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            self.done += len(finished)
            self._tell(total)
        return [future.result() for future in futures]

    def _tell(self, total: int) -> None:
        begins(f"compiling candidates, {self.done} of {total} done")


_here: list[Evaluator] = []  # of a worker


def _start_worker(evaluator: Evaluator) -> None:
    torch.set_num_threads(1)
    _here.append(evaluator)


def _evaluate_here(candidate: Candidate) -> Any:
    (evaluator,) = _here
    with shown_by(lambda what: None):
        return evaluator.task(evaluator.depths, candidate, evaluator.options, evaluator.pipeline)
