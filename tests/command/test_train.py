"""`spcompile train`: saved bytes and traffic are what was really saved and sent, and a wrong model is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from worker_pool import WorkerPool

from spcompile.collectives.counting import Traffic, count_collectives
from spcompile.command import train
from spcompile.command.model_spec import build_model
from spcompile.command.train import Batches
from spcompile.command.train_report import TrainingRun, TrainJob, TrainReport, relative
from spcompile.diagnostics import IllegalMesh, IllegalModel, IllegalOption, UnknownOption
from spcompile.schedule.saved_bytes import saved_activation_bytes

PoolOf = Callable[[int], WorkerPool]


class Square(nn.Module):
    """Saves what can be counted by hand: x (for the weight's gradient), the product and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return (y.view(2, -1) * y.view(2, -1)).sum()


def test_saved_bytes_count_each_storage_once_and_no_parameters() -> None:
    model, x = Square(), torch.ones(8, 4)
    floats = x.numel() + 8 * 6
    assert saved_activation_bytes(model, lambda: model(x)) == 4 * floats
    assert saved_activation_bytes(model, lambda: model(x.double().float())) == 4 * floats
    with torch.no_grad():
        assert saved_activation_bytes(model, lambda: model(x)) == 0


def test_saved_bytes_see_into_compiled_code_without_recompiling_it() -> None:
    model, x = Square(), torch.ones(8, 4)
    model.compile(backend="aot_eager", fullgraph=True)
    model(x).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert saved_activation_bytes(model, lambda: model(x)) == 4 * (x.numel() + 8 * 6)


def counted() -> list[Traffic]:
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)  # DETAIL compares the ranks with collectives of its own
    group = dist.new_group()
    dist.set_debug_level(level)
    name = group.group_name

    def step(x: Tensor) -> Tensor:
        gathered = functional.all_gather_tensor(x, 0, name)
        return functional.all_reduce(gathered.sin(), "sum", name)

    x = torch.ones(8, 16)
    compiled = torch.compile(step, backend="aot_eager")
    compiled(x)

    def run() -> None:
        compiled(x)
        other = 1 - dist.get_rank()
        sends = [dist.P2POp(op, x.double(), other, group) for op in (dist.isend, dist.irecv)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        dist.all_reduce(x.clone(), group=group)

    return count_collectives(run)


@pytest.mark.thinned(2)
def test_traffic_counts_compiled_and_eager_collectives(worker_pool: PoolOf) -> None:
    expected = [
        Traffic("all_reduce", 2, (16 + 8) * 16 * 4),
        Traffic("send", 1, 8 * 16 * 8),
        Traffic("all_gather", 1, 8 * 16 * 4),
    ]
    assert worker_pool(2).run(counted) == [expected, expected]


def job(**changes: Any) -> TrainJob:
    small = {"vocab": 256, "layers": 1}
    plain = TrainJob("models:llama-tiny", {"cp": 2}, steps=3, seq=32, settings=small, backend="aot_eager")
    return replace(plain, **changes)


def test_both_runs_see_the_same_batches_and_dp_ranks_their_rows() -> None:
    masked = job(model="models:bert-tiny", batch=4, mesh={"dp": 2})
    built = build_model(masked.model, seq=32, settings=masked.settings)
    whole = Batches(masked, built, "cpu")(1)
    parts = [Batches(masked, built, "cpu", rank, 2)(1) for rank in range(2)]
    assert set(whole) == {"ids_BS", "labels_BS"}
    assert all(torch.equal(torch.cat([part[name] for part in parts]), whole[name]) for name in whole)
    assert not torch.equal(whole["ids_BS"], Batches(masked, built, "cpu")(2)["ids_BS"])
    masked_BS = whole["labels_BS"] != -100
    assert masked_BS.any()
    assert (whole["ids_BS"][masked_BS] == 0).all()


@pytest.mark.thinned(5)
@pytest.mark.slow
def test_two_processes_train_and_agree(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    report = train.launch(job(text=str(text)))
    assert report.failures == []
    assert len(report.parallel.losses) == 3
    assert report.parallel.losses[-1] < report.parallel.losses[0]
    assert report.ranks_agree
    assert report.single.saved_bytes > 0
    assert report.traffic == []  # each rank trains the whole model: nothing is sharded without the backend
    assert report.to_dict()["max_difference"] <= 1e-5


@pytest.mark.slow
@pytest.mark.thinned(20)
@pytest.mark.parametrize(("attention", "collective"), [("ring", "send"), ("ulysses", "all_to_all")])
def test_the_backend_trains_as_one_device_does_and_saves_less(attention: str, collective: str) -> None:
    report = train.launch(job(backend="spcompile", options={"attention": attention, "compiler": "eager"}))
    assert report.failures == []
    assert report.parallel.saved_bytes < 0.75 * report.single.saved_bytes
    assert {"all_reduce", collective} <= {row.op for row in report.traffic}


@pytest.mark.parametrize(("off", "failures"), [(0.5e-5, 0), (2e-5, 1), (float("nan"), 1)])
def test_losses_that_part_are_a_failure(off: float, failures: int) -> None:
    single = TrainingRun([5.0, 4.0], 1.0, 1.0, 1, 1.0)
    parallel = replace(single, losses=[5.0, 4.0 * (1 + off)])
    differences = [relative(a, b) for a, b in zip(parallel.losses, single.losses, strict=True)]
    report = TrainReport(job(), 1, single, parallel, [], differences, True)
    assert len(report.failures) == failures
    assert all("step 2" in text and "on one device" in text for text in report.failures)
    assert replace(report, ranks_agree=False).failures[-1] == "the ranks do not report the same losses"


def test_the_default_text_is_real_and_long() -> None:
    text = train.read_text(None)
    assert len(text) > 100_000
    assert b"statement" in text


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "models:nothing"}, IllegalModel),
        ({"settings": {"vocab": 64}}, IllegalModel),
        ({"model": "models:gpt-tiny", "seq": 4096}, IllegalModel),
        ({"dtype": "int8"}, IllegalModel),
        ({"mesh": {"cq": 2}}, IllegalMesh),
        ({"mesh": {"dp": 2}, "batch": 3}, IllegalOption),
        ({"steps": 1}, IllegalOption),
        ({"options": {"attention": "rings"}}, IllegalOption),
        ({"options": {"atention": "ring"}}, UnknownOption),
        ({"seq": 10**9}, IllegalOption),
    ],
)
def test_what_cannot_work_is_said_before_a_process_starts(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        train.launch(job(**changes))
