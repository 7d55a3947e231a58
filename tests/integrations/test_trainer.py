"""The Trainer of transformers over a mesh against the same Trainer in one process, in the same run."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from oracle import FLOAT32
from trainer_runs import Rows, arguments, ddp_does_not_crash, launched, left_behind, padded, shared_folder, worst
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
EAGER = {"compiler": "eager"}


def trainer_of(model: Any, settings: dict[str, Any], rows: int, eval_rows: int, cls: Any, **others: Any) -> Any:
    """A Trainer with so many rows a batch, and so many to evaluate."""
    sizes = {f"per_device_{phase}_batch_size": rows for phase in ("train", "eval")}
    made = arguments(tempfile.mkdtemp(), settings | sizes)
    return cls(model, made, padded, Rows(40), Rows(eval_rows), **others)


def transformers_trainer() -> Any:
    import transformers  # slow: in the ranks only

    return transformers.Trainer


def everything(trainer: Any, *, evaluates: bool) -> dict[str, Any]:
    """What training, and evaluation and prediction, leave behind."""
    trainer.train()
    if not evaluates:
        return left_behind(trainer)
    trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    found = {"predictions": torch.tensor(predicted.predictions), "labels": torch.tensor(predicted.label_ids)}
    return left_behind(trainer) | found


def compare(model: str, settings: dict[str, Any], mesh: dict[str, int], evaluates: bool) -> dict[str, float]:
    """One rank's work: both Trainers on equal models; the errors. The plain one's batches have all rows of a step."""
    from spcompile.integrations.transformers import SequenceParallelTrainer

    made, batches = hf_models.build(model, layers=1), mesh.get("dp", 1)
    rows = 7 if batches > 1 else 4  # to evaluate: over dp the last batches are not full
    with launched(1):
        given = settings | {"torch_compile": False}
        plain = trainer_of(copy.deepcopy(made), given, 2 * batches, rows, transformers_trainer())
        assert plain.args.world_size == 1
        want = everything(plain, evaluates=evaluates)
    with launched(2), ddp_does_not_crash():
        cls = partial(SequenceParallelTrainer, mesh=mesh, spcompile_options=EAGER)
        return worst(want, everything(trainer_of(made, settings, 2, rows, cls), evaluates=evaluates))


def assert_as_one_process(pool: WorkerPool, *arguments: Any) -> None:
    for rank, errors in enumerate(pool.run(compare, *arguments)):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, f"rank {rank}: {bad}"
        assert len(errors) > 15


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated, clipped, smoothed": {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "label_smoothing_factor": 0.1,
        "include_num_input_tokens_seen": "all",
    },
    "checkpointed, grouped by length": {
        "gradient_checkpointing": True,
        "train_sampling_strategy": "group_by_length",
    },
    "workers": {"dataloader_num_workers": 1},
    "each its own tokens": {"average_tokens_across_devices": False, "torch_compile": True},
}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_two_ranks(worker_pool: PoolOf, axis: str, settings: str) -> None:
    assert_as_one_process(worker_pool(2), "llama", SETTINGS[settings], {axis: 2}, settings == "plain")


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "each its own tokens"])
@pytest.mark.parametrize("mesh", [{"dp": 2, "cp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_over_dp(worker_pool: PoolOf, mesh: dict[str, int], settings: str) -> None:
    # Which rows are grouped by length depends on the rows of a batch, of which one process has more.
    given = SETTINGS[settings] | {"train_sampling_strategy": "random"}
    assert_as_one_process(worker_pool(4), "llama", given, mesh, True)


def half_precision(mesh: dict[str, int]) -> tuple[float, float]:
    """How far training with autocast to bfloat16 leads from float32, in one process and over a mesh."""
    from spcompile.integrations.transformers import SequenceParallelTrainer

    made, found = hf_models.build("llama", layers=1), []
    with launched(1):
        for settings in ({}, {"bf16": True}):
            plain = trainer_of(copy.deepcopy(made), settings, 2, 4, transformers_trainer())
            plain.train()
            found.append(left_behind(plain))
    with launched(2):
        cls = partial(SequenceParallelTrainer, mesh=mesh, spcompile_options=EAGER)
        trainer = trainer_of(copy.deepcopy(made), {"bf16": True}, 2, 4, cls)
        trainer.train()
        found.append(left_behind(trainer))
    names = [name for name, _ in made.named_parameters()]
    exact, plainly, spread = (torch.cat([run[name].flatten() for name in names]) for run in found)
    return (plainly - exact).norm().item(), (spread - exact).norm().item()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_bf16(worker_pool: PoolOf, axis: str) -> None:
    for plainly, spread in worker_pool(2).run(half_precision, {axis: 2}):
        assert 0 < spread < 1.5 * plainly


def sharded() -> dict[str, float]:
    """A model whose parameters the user has split: trained, the best of its checkpoints loaded and saved again."""
    import spcompile
    from spcompile.integrations.transformers import SequenceParallelTrainer

    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    made, settings = (
        hf_models.build("llama", layers=1),
        {"max_grad_norm": 0.5, "save_steps": 2, "eval_steps": 2, **best},
    )
    with launched(1):
        plain = trainer_of(copy.deepcopy(made), settings, 2, 4, transformers_trainer())
        plain.train()
        want = left_behind(plain)
    with launched(2):
        spcompile.broadcast(made, {"cp": 2})
        spcompile.parallelize(made, {"cp": 2}, padded([Rows(2)[0]] * 2), shard_parameters="cp", **EAGER)
        cls = partial(SequenceParallelTrainer, mesh={"cp": 2})
        trainer = trainer_of(made, settings | {"output_dir": shared_folder()}, 2, 4, cls)
        trainer.train()
        trainer.save_model(folder := shared_folder())
        dist.barrier()
        have = left_behind(trainer) | dict(type(made).from_pretrained(folder).named_parameters())
    return worst(want, have)


@pytest.mark.thinned(4)
def test_sharded_parameters(worker_pool: PoolOf) -> None:
    for errors in worker_pool(2).run(sharded):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad
