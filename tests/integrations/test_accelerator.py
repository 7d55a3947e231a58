"""Training code on top of accelerate over a mesh, against the same code in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
from oracle import FLOAT32
from torch.utils.data import DataLoader, IterableDataset
from trainer_runs import Rows, ddp_does_not_crash, launched, padded, worst
from worker_pool import WorkerPool

from spcompile.diagnostics import SpcompileError

PoolOf = Callable[[int], WorkerPool]
EAGER = {"compiler": "eager"}


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """Rows without a length."""

    def __iter__(self) -> Any:
        return iter(Rows(13))


def loop(accelerator: Any, model: Any, rows: int) -> dict[str, Any]:
    """Three steps of two micro-batches each, a schedule, and a forward over rows that do not fill the last batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
    loaders = [DataLoader(data, rows, collate_fn=padded) for data in (Rows(6 * rows), Rows(13), Stream())]
    model, optimizer, schedule, train, rest, stream = accelerator.prepare(model, optimizer, schedule, *loaders)
    found: dict[str, Any] = {"loss": [], "norm": [], "rate": []}
    for batch in train:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                found["norm"].append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found["loss"].append(accelerator.reduce(loss.detach(), "mean").item())
        found["rate"].append(schedule.get_last_lr()[0])
    found["labels"] = torch.cat([accelerator.gather_for_metrics(batch["labels"]) for batch in rest])
    names = [accelerator.gather_for_metrics(["row"] * len(batch["labels"])) for batch in rest]
    found["names"] = [len(part) for part in names]
    found["stream"] = [float(sum(accelerator.gather_for_metrics(b["input_ids"]).sum() for b in stream))]
    return found | dict(accelerator.unwrap_model(model).named_parameters())


def compare(mesh: dict[str, int]) -> dict[str, float]:
    from accelerate import Accelerator

    from spcompile.integrations.accelerate import SequenceParallelAccelerator

    model, batches = hf_models.build("bert", layers=1), mesh.get("dp", 1)
    with launched(1):
        want = loop(Accelerator(cpu=True, gradient_accumulation_steps=2), copy.deepcopy(model), 2 * batches)
    with launched(2), ddp_does_not_crash():
        accelerator = SequenceParallelAccelerator(
            cpu=True, gradient_accumulation_steps=2, mesh=mesh, spcompile_options=EAGER
        )
        assert accelerator.ranks_per_batch * accelerator.num_batches == accelerator.num_processes
        return worst(want, loop(accelerator, model, 2))


@pytest.mark.thinned(14)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_two_ranks(worker_pool: PoolOf, axis: str) -> None:
    for errors in worker_pool(2).run(compare, {axis: 2}):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad


def batches_over_dp(mesh: dict[str, int]) -> tuple[list[Any], float]:
    """The rows that this process gets, its place along dp, and how far a step takes a schedule for two batches."""
    from spcompile.integrations.accelerate import SequenceParallelAccelerator

    with launched(4), ddp_does_not_crash():
        accelerator = SequenceParallelAccelerator(cpu=True, mesh=mesh, spcompile_options=EAGER)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
        loaders = [DataLoader(data, 2, collate_fn=padded) for data in (Rows(7), Stream())]
        optimizer, schedule, rows, stream = accelerator.prepare(optimizer, schedule, *loaders)
        optimizer.step()
        schedule.step()
        place = accelerator.batch_index
        firsts = [[batch["input_ids"][:, :3].tolist() for batch in loader] for loader in (rows, stream)]
        once = sum(len(accelerator.gather_for_metrics(batch["labels"])) for batch in rows)
        return [place, firsts, once], schedule.get_last_lr()[0]


@pytest.mark.slow
@pytest.mark.thinned(2)
@pytest.mark.parametrize("mesh", [{"dp": 2, "cp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_batches_over_dp(worker_pool: PoolOf, mesh: dict[str, int]) -> None:
    found = worker_pool(4).run(batches_over_dp, mesh)
    for (place, firsts, once), rate in found:
        assert once == 7
        assert rate == pytest.approx(0.75)
        for other, theirs, _ in (row for row, _ in found):
            assert (firsts == theirs) == (place == other)
    assert {place for (place, _, _), _ in found} == {0, 1}


def refused() -> list[str]:
    from accelerate.utils import DataLoaderConfiguration, ParallelismConfig

    from spcompile.integrations.accelerate import SequenceParallelAccelerator

    wrong: list[dict[str, Any]] = [
        {"mesh": {"cp": 3}},
        {"mesh": {"cp": 2}, "spcompile_options": {"mesh": {"cp": 2}}},
        {"mesh": {"cp": 2}, "spcompile_options": {"atention": "ring"}},
        {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)},
        {"dynamo_backend": "aot_eager"},
        {"parallelism_config": ParallelismConfig()},
    ]
    texts = []
    for given in wrong:
        with launched(2), pytest.raises(SpcompileError) as caught:
            SequenceParallelAccelerator(cpu=True, **given)
        texts.append(str(caught.value))
    with launched(2), pytest.raises(SpcompileError) as caught:
        SequenceParallelAccelerator(cpu=True).prepare(torch.compile(torch.nn.Linear(2, 2)))
    return [*texts, str(caught.value)]


def test_what_is_refused(worker_pool: PoolOf) -> None:
    ours, theirs = worker_pool(2).run(refused)
    assert ours == theirs
    words = ["SP103", "legal: mesh=", "did you mean 'attention'", "dispatch_batches", "'aot_eager'", "legal: mesh={"]
    for word, text in zip([*words, "torch.compile has wrapped"], ours, strict=True):
        assert word in text, text
