"""What `spcompile.verify` does: a trial, its results beside the plain model's, and where a difference begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import IllegalModel
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.program.pipeline import Snapshot
from spcompile.program.trace import Inputs
from spcompile.report.bisect import culprit_of
from spcompile.report.broken_model import BrokenModel
from spcompile.report.final_run import run_final
from spcompile.report.noise import allowance, noise_of
from spcompile.report.plain_run import run_eager
from spcompile.report.trial import SeveralGraphs, Trial, trial_of
from spcompile.report.verify_report import Kind, Report, TensorError, is_exact, largest

EXPECTED_OF_ONE_DEVICE = (
    "attention has dropout: expected is what one device gets from the same graph, not the plain model"
)
DRAWN_BY_RANKS = "over dp each rank draws its own random numbers, the plain model draws for all entries: they differ"
PARTS = "the model is not one graph: {count} parts ran, compared together ('parts') and each by itself"
NOISY = "rounding moves {name} by {part:.0%} of its largest element: little is compared there"
NOISY_PART = 0.25


def compare_with_plain(
    model: nn.Module,
    example_inputs: Inputs,
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    tolerance: float | None,
) -> Report:
    """See `spcompile.verify`."""
    _require_real(model)
    cpu_rng = torch.get_rng_state()
    try:
        eager = run_eager(model, example_inputs, options)
        try:
            trial = trial_of(model, example_inputs, mesh, options, pipeline, eager, cpu_rng)
        except SeveralGraphs:
            broken = BrokenModel(model, example_inputs, mesh, options, eager, cpu_rng)
            return _compare_parts(broken, mesh, pipeline, tolerance)
        is_of_one_device = trial.expect_of_one_device()
        notes = [EXPECTED_OF_ONE_DEVICE] if is_of_one_device else []
        rows, of_noise, why_not = _compare_graph(
            trial, trial.traced.model_itself if is_of_one_device else trial.captured, tolerance
        )
        notes += of_noise
        if trial.entries and trial.program.draws_random_numbers and not all(row.ok for row in rows):
            notes.append(DRAWN_BY_RANKS)
        remarks = list(trial.program.ctx.remarks.rows)
        report = Report(mesh, trial.tolerance, rows, remarks=remarks, notes=notes + why_not)
        report.culprit = None if report.ok else culprit_of(trial)
        return report
    finally:
        torch.set_rng_state(cpu_rng)


def _compare_parts(broken: BrokenModel, mesh: MeshShape, pipeline: Sequence[Pass], tolerance: float | None) -> Report:
    """A model of several graphs: the loss and gradients of all of them together, then each by itself."""
    broken.run(pipeline)
    notes = [PARTS.format(count=len(broken.trials))]
    found = [_compare_graph(trial, trial.captured, tolerance) for trial in broken.trials]
    tolerance_of = broken.trials[0].tolerance_of
    top = max(tolerance_of(value) for _, value, _ in broken.wanted())
    rows = broken.rows(tolerance_of)
    if tolerance is None and not all(row.ok for row in rows):
        moved = broken.noise()
        values = [(*key, value, moved.get(key, 0.0)) for key, value, _ in broken.wanted()]
        broken.allowed, of_noise, top = _allowed(values, tolerance_of, top)
        notes += of_noise
        rows = broken.rows(tolerance_of)
    rows += [row for own, _, _ in found for row in own]
    notes += [note for _, of_noise, why_not in found for note in (*of_noise, *why_not)]
    remarks = [remark for trial in broken.trials for remark in trial.program.ctx.remarks.rows]
    top = max(top, *[trial.tolerance for trial in broken.trials])
    report = Report(mesh, top, rows, remarks=list(dict.fromkeys(remarks)), notes=list(dict.fromkeys(notes)))
    wrong = (trial for trial, (own, _, _) in zip(broken.trials, found, strict=True) if not all(row.ok for row in own))
    report.culprit = next((culprit_of(trial) for trial in wrong), None)
    return report


def _compare_graph(
    trial: Trial, graph: Snapshot, tolerance: float | None
) -> tuple[list[TensorError], list[str], list[str]]:
    """(the results, notes on what rounding makes most of, why the final graphs could not be compared).

    Only what is wrong otherwise may differ by what rounding makes of it in `graph`, and not where the user has said how
    much.
    """
    trial.given_tolerance = tolerance
    trial.tolerance = max((trial.tolerance_of(x.value) for x in trial.wanted() if x.value is not None), default=0.0)
    rows, why_not = _rows(trial)
    if tolerance is not None or all(row.ok for row in rows):
        return rows, [], why_not
    notes = _allow_noise(trial, graph)
    rows, why_not = _rows(trial)
    return rows, notes, why_not


def _rows(trial: Trial) -> tuple[list[TensorError], list[str]]:
    """What the graphs before and behind autograd give; and why the latter could not be compared."""
    last = [s for s in trial.program.history.snapshots if s.stage is not Stage.SCHEDULE][-1]
    rows = trial.errors("local", trial.run(last))
    final = run_final(trial, trial.traced.sharded.graphs)
    if isinstance(final, str):
        return rows, [final]
    rows += trial.errors("final", final)
    late = run_final(trial, trial.traced.sharded.graphs, "late") if all(row.ok for row in rows) else ""
    rows += [] if isinstance(late, str) else [row for row in trial.errors("late", late) if not row.ok]
    return rows, []


def _require_real(model: nn.Module) -> None:
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise IllegalModel("it is parallelized, and one rank's parts say nothing", legal="the model before parallelize")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta or isinstance(value, FakeTensor):
            legal = "real weights: build the model on a device, or model.to_empty(...) and initialise it"
            raise IllegalModel(f"{name} has no data, and verify computes", legal=f"{legal}; explain() needs none")


def _allow_noise(trial: Trial, graph: Snapshot) -> list[str]:
    """Let each tensor differ by what rounding makes of it, where that is more; notes on those that it makes most of.

    The trial's tolerance becomes the largest of them, relative to their tensors.
    """
    noise = noise_of(trial, graph)
    values = [
        (x.kind, x.name, x.value, getattr(noise, x.values).get(x.place, 0.0))
        for x in trial.wanted()
        if x.value is not None
    ]
    trial.allowed, notes, trial.tolerance = _allowed(values, trial.tolerance_of, trial.tolerance)
    return notes


def _allowed(
    values: Iterable[tuple[Kind, str, Tensor, float]], tolerance_of: Callable[[Tensor], float], tolerance: float
) -> tuple[dict[tuple[Kind, str], float], list[str], float]:
    """(absolute differences that are rounding, notes on tensors that it makes most of, the largest tolerance).

    values: kind, name, expected, how far noise moves it. tolerance: the largest without noise.
    """
    allowed: dict[tuple[Kind, str], float] = {}
    notes = []
    for kind, name, expected, moved in values:
        if is_exact(expected):
            continue
        size = largest(expected)
        allowed[kind, name] = max(allowance(moved, expected), tolerance_of(expected) * size)
        part = allowed[kind, name] / size if size else 0.0
        if part > NOISY_PART:
            notes.append(NOISY.format(name=f"the gradient of {name}" if kind == "gradient" else name, part=part))
        else:
            tolerance = max(tolerance, part)
    return allowed, notes, tolerance
