"""A folder that cannot be written to is one error on all ranks, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from refusals import refusal, same_text
from torch import nn
from worker_pool import WorkerPool

from spcompile import backend

PoolOf = Callable[[int], WorkerPool]
SECONDS = 60.0


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(backend="spcompile", options={"compiler": "eager", **options})
    return model


def refused(folder: str, ranks: tuple[int, ...]) -> str:
    options = {"dump": folder} if dist.get_rank() in ranks else {}
    model = compiled(pm.SelfAttention(), **options)
    with mock.patch.object(backend, "build", side_effect=AssertionError("compiled")):
        return refusal(lambda: model(torch.ones(2, 16, pm.WIDTH)))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)], ids=str)
def test_a_file_in_its_place(worker_pool: PoolOf, tmp_path: Path, ranks: tuple[int, ...]) -> None:
    folder = tmp_path / "dump"
    folder.write_text("")
    text = same_text(worker_pool(2).run(refused, str(folder), ranks, timeout=SECONDS))
    assert text.startswith(f"SP102 illegal option value: dump='{folder}': ")


def full_on_rank_1(folder: str) -> str:
    """The disk fills up while the graphs are written."""

    def write_text(path: Path, text: str, encoding: str) -> None:
        if dist.get_rank() == 1 and path.name == "forward.py":
            raise OSError(28, "No space left on device")
        path.write_bytes(text.encode())

    model = compiled(pm.SelfAttention(), dump=folder)
    with mock.patch.object(Path, "write_text", write_text):
        return refusal(lambda: model(torch.ones(2, 16, pm.WIDTH)))


@pytest.mark.thinned(2)
def test_a_disk_that_is_full_later(worker_pool: PoolOf, tmp_path: Path) -> None:
    text = same_text(worker_pool(2).run(full_on_rank_1, str(tmp_path), timeout=SECONDS))
    assert text.startswith(f"SP102 illegal option value: dump='{tmp_path}': No space left on device")


def dumped_twice(folder: str) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        compiled(pm.SelfAttention(), dump=folder)(torch.ones(2, 16, pm.WIDTH)).sum().backward()


@pytest.mark.thinned(8)
def test_what_an_older_run_left_is_removed_and_this_run_s_stays(worker_pool: PoolOf, tmp_path: Path) -> None:
    for rank in range(4):
        old = tmp_path / f"rank{rank}" / "graph1000000"
        old.mkdir(parents=True)
        (old / "00-capture.txt").write_text("old")
    worker_pool(2).run(dumped_twice, str(tmp_path), timeout=SECONDS)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["rank0", "rank1"]
    for rank in tmp_path.iterdir():
        graphs = list(rank.iterdir())
        assert len(graphs) == 2
        assert all((graph / "00-capture.txt").read_text() != "old" for graph in graphs)
        assert all((graph / f"{phase}.py").exists() for graph in graphs for phase in ("forward", "backward"))
