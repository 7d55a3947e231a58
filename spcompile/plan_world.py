"""`spcompile.plan`: which mesh and which options for so many ranks. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.fx as fx
    from torch import nn

    from spcompile.options import Options
    from spcompile.planning.candidates import Candidate
    from spcompile.planning.search import Depths, Evaluator, Result, Task
    from spcompile.report.plan_table import RankedPlans

MOST_TRIED = 1024  # ranks, where none of the meshes that were asked for has enough memory
MOST_COMPILED = 16  # ways, where one of them fits
TRIED_FURTHER = 2  # meshes of which more than one way to hold parameters is tried


def plan(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    world: int,
    *,
    axes: Sequence[str] = ("tp", "cp", "dp"),
    workers: int | None = None,
    **options: Any,
) -> RankedPlans:
    """Every mesh of `world` ranks and every way to run the model on it, ranked by predicted time.

    Needs no devices. Each candidate is compiled as `parallelize` would, at two small depths: layers that are equal in
    the graph take equally much. Saved and sent bytes are those of a full compile, peaks and seconds differ by a few
    percent at most. Of many ways those are compiled that take least with products at full speed and what attention
    sends; a note says how many were not.

    model: its weights may be real, fake or on `meta`.
    inputs: of one training step, with the whole batch: dp splits it.
    axes: that meshes may have.
    workers: processes that compile; default: one for each core. One where this process uses CUDA.
    options: those of the backend, but `mesh`, `attention` and `on_graph_break`. `accelerator`, `links`, `memory` and
        `optimizer` decide. `outputs` is "loss" by default.

    Raises:
        SpcompileError: an illegal option, no mesh of so many ranks, none that fits, a model without attention.
    """
    from spcompile.diagnostics import IllegalMesh, OutOfMemory
    from spcompile.machine.mesh import MOST_RANKS
    from spcompile.planning.candidates import first_round, meshes, require_known_axes
    from spcompile.planning.least_seconds import least_seconds
    from spcompile.report.plan_table import itemsize_of, ranked_plans

    if not isinstance(world, int) or isinstance(world, bool) or not 1 <= world <= MOST_RANKS:
        raise IllegalMesh(f"world={world!r}", legal=f"1 to {MOST_RANKS} ranks")
    require_known_axes(axes)
    chosen = checked_options(options)
    found: dict[str, Any] = {}
    results: list[Result] = []

    def read(depths: Depths, _: int) -> None:
        candidates, itemsize = first_round(meshes(world, axes, depths.heads), depths.heads), itemsize_of(model)
        least = {one: least_seconds(depths, one, chosen, itemsize) for one in candidates}
        ordered = sorted(least, key=lambda one: least[one])
        found.update(depths=depths, least=least, ordered=ordered)
        of_one = [one for one in ordered[:MOST_COMPILED] if one.size("dp") == 1]
        results.extend(_explored(depths, of_one, (), chosen, workers))

    with_depths(model, inputs, 1, chosen, read)
    others = _compiled_until_one_fits(model, inputs, found["ordered"], results, chosen, workers)
    least_of_others = {one: found["least"][one] for one in others}
    plans = ranked_plans(model, results, found["depths"], world, chosen, least_of_others)
    if plans.rows and not plans.rows[0].fits:
        smallest = min(plans.rows, key=lambda row: row.figures.total).result.candidate
        raise OutOfMemory(plans.too_large(), legal=_enough(model, inputs, smallest, chosen))
    if not plans.rows:
        raise IllegalMesh(results[0].error, legal="see above")
    return plans


def _compiled_until_one_fits(
    model: nn.Module,
    inputs: Any,
    ordered: Sequence[Candidate],
    results: list[Result],
    options: Options,
    workers: int | None,
) -> Sequence[Candidate]:
    """Adds to the results those of the first candidates, and of more until one fits; returns those that are left.

    ordered: all, by what they take at least. results: those that are known, which are not compiled again.
    """
    for start in range(0, len(ordered), MOST_COMPILED):
        done = {result.candidate for result in results}
        near = [one for one in ordered[start : start + MOST_COMPILED] if one not in done]

        def explore(depths: Depths, dp: int, ones: Sequence[Candidate] = near) -> None:
            wanted = [one for one in ones if one.size("dp") == dp]
            results.extend(_explored(depths, wanted, results, options, workers))

        for dp in dict.fromkeys(one.size("dp") for one in near):
            with_depths(model, inputs, dp, options, explore)
        if any(result.fits for result in results):
            return ordered[start + MOST_COMPILED :]
    return ()


def _enough(model: nn.Module, inputs: Any, least: Candidate, options: Options) -> str:
    """How many ranks would do: those of the candidate that takes least, with cp doubled until a step fits."""
    from spcompile.passes import PIPELINE
    from spcompile.planning.search import evaluate
    from spcompile.program.plugins import with_plugins

    pipeline = with_plugins(PIPELINE, options)
    found = f"more than {MOST_TRIED} ranks, fewer tokens, or another optimizer"

    def explore(depths: Depths, dp: int) -> None:
        nonlocal found
        one = least.with_more_ranks()
        while one.ranks <= MOST_TRIED and one.size("cp") <= depths.heads.tokens:
            if evaluate(depths, one, options, pipeline).fits:
                found = f"{one.ranks} ranks would do: " + " ".join(f"{axis}={size}" for axis, size in one.mesh)
                return
            one = one.with_more_ranks()

    with_depths(model, inputs, least.size("dp"), options, explore)
    return found


def checked_options(options: Mapping[str, Any]) -> Options:
    """The options of a plan.

    Raises:
        IllegalOption, UnknownOption: one that does not exist, or that a plan finds.
    """
    from spcompile.diagnostics import IllegalOption
    from spcompile.options import Options

    for name in ("mesh", "attention", "on_graph_break", "shard_parameters"):
        if name in options:
            raise IllegalOption(f"{name}={options[name]!r} for a plan", legal="none: it is what a plan finds")
    return Options.parse({"outputs": "loss", **options})


def with_depths(model: nn.Module, inputs: Any, dp: int, options: Options, explore: Any) -> None:
    """Read the model on one rank's entries of the batch, and call `explore` while Dynamo's context is there."""
    import torch

    from spcompile.machine.rank_parts import split_batch
    from spcompile.passes import PIPELINE
    from spcompile.planning.search import depths_of
    from spcompile.program.plugins import with_plugins
    from spcompile.program.trace import through_dynamo
    from spcompile.program.whole_batch import over_whole_batch

    parameters = {id(p) for p in model.parameters()}
    pipeline = with_plugins(PIPELINE, options)

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        explore(depths_of(gm, given, [id(x) in parameters for x in given], options, pipeline), dp)

    with torch.enable_grad():
        through_dynamo(model, split_batch(inputs, dp)[0], over_whole_batch(backend, dp), options, dp)


def evaluator_of(depths: Depths, options: Options, workers: int | None, task: Task | None = None) -> Evaluator:
    """Evaluates candidates, by default with one process for each core."""
    from spcompile.machine.host import cores
    from spcompile.passes import PIPELINE
    from spcompile.planning.search import Evaluator, evaluate
    from spcompile.program.plugins import with_plugins

    return Evaluator(depths, options, with_plugins(PIPELINE, options), workers or cores(), task or evaluate)


def _explored(
    depths: Depths, ones: Sequence[Candidate], before: Sequence[Result], options: Options, workers: int | None
) -> list[Result]:
    """Results of these, and of other ways to hold parameters on meshes that are among the best with those `before`."""
    from spcompile.planning.candidates import second_round

    if not ones:
        return []
    with evaluator_of(depths, options, workers).running() as running:
        results = running.results(ones)
        best = _best_of_meshes([*before, *results])[:TRIED_FURTHER]
        return results + running.results(second_round(one for one in best if one in ones))


def _best_of_meshes(results: Sequence[Result]) -> list[Candidate]:
    """Of each mesh its best candidate, the best mesh first."""
    found = [(result, result.figures) for result in results if result.figures is not None]
    found.sort(key=lambda pair: (not pair[0].fits, pair[1].seconds if pair[0].fits else pair[1].total))
    best: dict[Any, Candidate] = {}
    for result, _ in found:
        best.setdefault(result.candidate.mesh, result.candidate)
    return list(best.values())
