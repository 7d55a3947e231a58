"""A checkpoint of the Trainer over one mesh goes on over another, and in one process."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch.distributed as dist
from oracle import FLOAT32
from trainer_runs import Rows, arguments, launched, left_behind, padded, shared_folder, worst
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
EAGER = {"compiler": "eager"}
HALF_WAY = {"save_strategy": "steps", "save_steps": 3}


Place = tuple[dict[str, int] | None, str | tuple[str, ...] | None]  # a mesh, and over which axes parameters are split
ALONE: Place = (None, None)


def run(made: Any, folder: Path, place: Place, start: Path | None = None) -> dict[str, Any]:
    """Five steps, or those behind a checkpoint; in one process without a mesh."""
    import transformers

    from spcompile.integrations.transformers import SequenceParallelTrainer

    cls: Any = transformers.Trainer
    mesh, shard = place
    if mesh is not None:
        cls = partial(SequenceParallelTrainer, mesh=mesh, spcompile_options=EAGER, shard_parameters=shard)
    with launched(1 if mesh is None else 2):
        trainer = cls(copy.deepcopy(made), arguments(str(folder), HALF_WAY), padded, Rows(40))
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        found = left_behind(trainer)
    return {name: value for name, value in found.items() if name != "train_loss"}  # that is of this call's steps


def resumed(model: str, first: Place, then: Place) -> dict[str, float]:
    """Errors of a run that changes its mesh after three of five steps."""
    made, folder = hf_models.build(model, layers=1), Path(shared_folder())
    want = run(made, folder / f"plain{dist.get_rank()}", ALONE)
    if first != ALONE or dist.get_rank() == 0:
        run(made, folder / "first", first)
    dist.barrier()
    have = run(
        made, folder / f"then{dist.get_rank() if then == ALONE else ''}", then, folder / "first" / "checkpoint-3"
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return worst(want, have)


CP, TP = ({"cp": 2}, None), ({"tp": 2}, None)
SHARDED_CP, SHARDED_TP = ({"cp": 2}, "cp"), ({"tp": 2}, ())
PLACES = [
    (CP, CP),
    (CP, TP),
    (CP, ALONE),
    (ALONE, CP),
    (SHARDED_CP, ALONE),
    (ALONE, SHARDED_TP),
    (SHARDED_TP, SHARDED_CP),
]


@pytest.mark.thinned(30)
@pytest.mark.parametrize(("first", "then"), PLACES, ids=str)
def test_resumes(worker_pool: PoolOf, first: Place, then: Place) -> None:
    for rank, errors in enumerate(worker_pool(2).run(resumed, "llama", first, then)):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, f"rank {rank}: {bad}"
        assert len(errors) > 15
