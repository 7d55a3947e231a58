"""What `spcompile.verify` does: a trial, its results beside the plain model's, and where a difference begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from spcompile.diagnostics import IllegalModel, IllegalOption
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass, Stage
from spcompile.program.trace import Inputs
from spcompile.report.bisect import culprit_of
from spcompile.report.broken_model import BrokenModel
from spcompile.report.noise import Noise, allowance, noise_of
from spcompile.report.trial import Eager, SeveralGraphs, Trial, run_eager, trial_of
from spcompile.report.verify_report import Report, TensorError, is_exact, largest

DEFAULT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
MIXED_TOLERANCE = 1e-6  # a float64 model that computes something in float32
EXPECTED_OF_ONE_DEVICE = (
    "attention has dropout: expected is what one device gets from the same graph, not the plain model"
)
DRAWN_BY_RANKS = "over dp each rank draws its own random numbers, the plain model draws for all rows: they differ"
PARTS = "the model is not one graph: {count} parts ran, compared together ('parts') and each by itself"
NOISY = "rounding moves {name} by {part:.0%} of its largest element: little is compared there"
NOISY_PART = 0.25
ROUNDING = 8  # units in the last place of the largest gradient: what less is, is rounding


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
            torch.set_rng_state(cpu_rng)
            return _compare_parts(model, example_inputs, mesh, options, pipeline, tolerance, eager)
        notes = [EXPECTED_OF_ONE_DEVICE] if trial.expect_of_one_device() else []
        coarsest, is_mixed = _coarsest([trial])
        eps = torch.finfo(coarsest).eps
        if tolerance is None and coarsest.itemsize < 4:
            noise = noise_of(model, example_inputs, options, eager, eps, cpu_rng)
            notes += _allow(trial, noise, eps)
        else:
            _set_tolerance(trial, tolerance, coarsest, is_mixed)
        rows = _rows_of(trial, notes)
        if trial.rows and trial.program.draws_random_numbers and not all(row.ok for row in rows):
            notes.append(DRAWN_BY_RANKS)
        report = Report(mesh, trial.tolerance, rows, remarks=list(trial.program.ctx.remarks.rows), notes=notes)
        report.culprit = None if report.ok else culprit_of(trial)
        return report
    finally:
        torch.set_rng_state(cpu_rng)


def _require_real(model: nn.Module) -> None:
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise IllegalModel("it is parallelized, and one rank's parts say nothing", legal="the model before parallelize")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta or isinstance(value, FakeTensor):
            legal = "real weights: build the model on a device, or model.to_empty(...) and initialise it"
            raise IllegalModel(f"{name} has no data, and verify computes", legal=f"{legal}; explain() needs none")


def _compare_parts(
    model: nn.Module,
    example_inputs: Inputs,
    mesh: MeshShape,
    options: Options,
    pipeline: Sequence[Pass],
    tolerance: float | None,
    eager: Eager,
) -> Report:
    """A model of several graphs: the loss and gradients of all of them together, then each by itself."""
    broken = BrokenModel(model, mesh)
    broken.run(model, example_inputs, options, pipeline, eager)
    coarsest, is_mixed = _coarsest(broken.trials)
    if tolerance is None and coarsest.itemsize < 4:
        raise IllegalOption("verify of a model of several graphs in half precision", legal="float32, or tolerance=")
    for trial in broken.trials:
        _set_tolerance(trial, tolerance, coarsest, is_mixed)
    first, notes = broken.trials[0], [PARTS.format(count=len(broken.trials))]
    rows = broken.rows(eager, first.tolerance, first.rounding)
    found = [_rows_of(trial, notes) for trial in broken.trials]
    remarks = [remark for trial in broken.trials for remark in trial.program.ctx.remarks.rows]
    rows += [row for of_trial in found for row in of_trial]
    report = Report(mesh, first.tolerance, rows, remarks=list(dict.fromkeys(remarks)), notes=notes)
    wrong = (trial for trial, own in zip(broken.trials, found, strict=True) if not all(row.ok for row in own))
    report.culprit = next((culprit_of(trial) for trial in wrong), None)
    return report


def _set_tolerance(trial: Trial, tolerance: float | None, coarsest: torch.dtype, is_mixed: bool) -> None:
    eps = torch.finfo(coarsest).eps
    default = MIXED_TOLERANCE if is_mixed else DEFAULT_TOLERANCE.get(coarsest, eps)
    trial.tolerance = default if tolerance is None else tolerance
    trial.rounding = ROUNDING * eps if coarsest.itemsize >= 4 else eps


def _rows_of(trial: Trial, notes: list[str]) -> list[TensorError]:
    """The graph before autograd and the final graphs; what could not be compared is noted."""
    last = [s for s in trial.program.history.snapshots if s.stage is not Stage.SCHEDULE][-1]
    rows = trial.errors("local", trial.run(last))
    final = trial.run_final(trial.traced.sharded.graphs)
    notes += [final] if isinstance(final, str) else []
    rows += [] if isinstance(final, str) else trial.errors("final", final)
    late = trial.run_final(trial.traced.sharded.graphs, "late") if all(row.ok for row in rows) else ""
    rows += [] if isinstance(late, str) else [row for row in trial.errors("late", late) if not row.ok]
    return rows


def _coarsest(trials: Sequence[Trial]) -> tuple[torch.dtype, bool]:
    """The floating dtype in the graphs that rounds most; whether it is float32 beside float64."""
    nodes = [n for trial in trials for n in trial.program.captured.graph.nodes]
    vals = [v for n in nodes for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, Tensor)]
    dtypes = {v.dtype for v in vals if v.is_floating_point()} or {torch.float32}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return coarsest, coarsest is torch.float32 and torch.float64 in dtypes


def _allow(trial: Trial, noise: Noise, eps: float) -> list[str]:
    """Let each tensor differ by what noise makes of it; notes on those that are noise for the most part.

    The trial's tolerance becomes the largest of them, relative to their tensors.
    """
    outputs = [("output", name, noise.outputs.get(name, 0.0), x) for name, x in trial.outputs.values()]
    gradients = [
        ("gradient", name, noise.gradients.get(trial.sources[i], 0.0), x) for i, (name, x) in trial.gradients.items()
    ]
    notes = []
    for kind, name, moved, expected in [*outputs, *gradients]:
        if expected is None or is_exact(expected):
            continue
        trial.allowed[kind, name] = allowed = allowance(moved, expected, eps)
        part = allowed / largest(expected) if allowed else 0.0
        if part > NOISY_PART:
            notes.append(NOISY.format(name=name if kind == "output" else f"the gradient of {name}", part=part))
        else:
            trial.tolerance = max(trial.tolerance, part)
    return notes
