"""What `spcompile.verify` does: a trial, its results beside the plain model's, and where a difference begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import IllegalModel
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.program.pipeline import Snapshot
from spcompile.program.trace import Inputs
from spcompile.report.bisect import culprit_of
from spcompile.report.final_run import run_final
from spcompile.report.noise import allowance, noise_of
from spcompile.report.plain_run import run_eager
from spcompile.report.trial import Trial, trial_of
from spcompile.report.verify_report import Report, TensorError, is_exact, largest

EXPECTED_OF_ONE_DEVICE = (
    "attention has dropout: expected is what one device gets from the same graph, not the plain model"
)
DRAWN_BY_RANKS = "over dp each rank draws its own random numbers, the plain model draws for all entries: they differ"
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
        trial = trial_of(model, example_inputs, mesh, options, pipeline, eager, cpu_rng)
        is_of_one_device = trial.expect_of_one_device()
        notes = [EXPECTED_OF_ONE_DEVICE] if is_of_one_device else []
        trial.given_tolerance = tolerance
        trial.tolerance = max((trial.tolerance_of(x.value) for x in trial.wanted() if x.value is not None), default=0.0)
        rows, why_not = _rows(trial)
        if tolerance is None and not all(row.ok for row in rows):
            notes += _allow_noise(trial, trial.traced.model_itself if is_of_one_device else trial.captured)
            rows, why_not = _rows(trial)
        if trial.entries and trial.program.draws_random_numbers and not all(row.ok for row in rows):
            notes.append(DRAWN_BY_RANKS)
        remarks = list(trial.program.ctx.remarks.rows)
        report = Report(mesh, trial.tolerance, rows, remarks=remarks, notes=notes + why_not)
        report.culprit = None if report.ok else culprit_of(trial)
        return report
    finally:
        torch.set_rng_state(cpu_rng)


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
    notes = []
    for wanted in trial.wanted():
        if wanted.value is None or is_exact(wanted.value):
            continue
        size = largest(wanted.value)
        moved = getattr(noise, wanted.values).get(wanted.place, 0.0)
        allowed = max(allowance(moved, wanted.value), trial.tolerance_of(wanted.value) * size)
        trial.allowed[wanted.kind, wanted.name] = allowed
        part = allowed / size if size else 0.0
        if part > NOISY_PART:
            notes.append(
                NOISY.format(
                    name=f"the gradient of {wanted.name}" if wanted.kind == "gradient" else wanted.name, part=part
                )
            )
        else:
            trial.tolerance = max(trial.tolerance, part)
    return notes
