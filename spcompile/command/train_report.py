"""What `spcompile train` is asked to do and what it found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from spcompile.collectives.counting import Traffic
from spcompile.machine.mesh import MeshShape

# Largest relative difference of the two losses at any step. 16-bit models round every activation to 8 or 11 bits.
TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}


@dataclass(frozen=True)
class TrainJob:
    """What to train: `mesh` are axis sizes, `options` go to the backend, `text` is a file of bytes."""

    model: str
    mesh: Mapping[str, int]
    steps: int = 60
    seq: int = 1024
    batch: int = 1
    lr: float = 1e-3
    dtype: str = "float32"
    seed: int = 0
    text: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    dump: str | None = None
    backend: str = "spcompile"

    @property
    def ranks(self) -> int:
        """Number of processes: the product of the mesh's axes."""
        return MeshShape.of(self.mesh).world_size


@dataclass(frozen=True)
class TrainingRun:
    """One model's training: a loss per step, seconds of the first and of a usual step, bytes kept for backward."""

    losses: list[float]
    first_seconds: float
    step_seconds: float
    saved_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class TrainReport:
    """Both runs side by side, and what one compiled step sends."""

    job: TrainJob
    parameters: int
    single: TrainingRun
    parallel: TrainingRun
    traffic: list[Traffic]
    differences: list[float]
    ranks_agree: bool

    @property
    def tolerance(self) -> float:
        """How far the losses may part."""
        return TOLERANCE[self.job.dtype]

    @property
    def failures(self) -> list[str]:
        """What went wrong, in words; empty if nothing did."""
        found = []
        for step, difference in enumerate(self.differences):
            if not difference <= self.tolerance:
                single, parallel = self.single.losses[step], self.parallel.losses[step]
                found.append(
                    f"the losses part at step {step + 1}: {parallel:.9g} on {self.job.ranks} ranks, {single:.9g} on "
                    f"one device (relative difference {difference:.1e}, allowed {self.tolerance:.0e})"
                )
                break
        if not self.ranks_agree:
            found.append("the ranks do not report the same losses")
        return found

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON types."""
        return {"schema": 1, **asdict(self), "max_difference": max(self.differences), "failures": self.failures}


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|."""
    return abs(value - reference) / abs(reference)
