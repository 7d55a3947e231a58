"""Mistakes end in one error with the same text on every rank, soon, and never in a hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from oracle import default_dtype
from refusals import compiled, ids, refusal, same_text
from torch import Tensor, nn
from worker_pool import WorkerPool

from spcompile import models

PoolOf = Callable[[int], WorkerPool]
SECONDS = 30.0


def gpt() -> nn.Module:
    return models.build("gpt-tiny", layers=1)


def other_lengths() -> str:
    model = compiled(gpt())
    return refusal(lambda: model(ids(16 + dist.get_rank()), ids(16 + dist.get_rank())))


def other_dtypes() -> str:
    with default_dtype([torch.float32, torch.float64][dist.get_rank()]):
        model = compiled(gpt())
        return refusal(lambda: model(ids()))


def other_options() -> str:
    model = compiled(gpt(), attention=["ring", "ulysses"][dist.get_rank()])
    return refusal(lambda: model(ids()))


def one_typo() -> str:
    return options_refused({"attention": ["ring", "rings"][dist.get_rank()]})


def breaks_alone() -> str:
    model = compiled([pm.SelfAttention, Breaks][dist.get_rank()]())
    return refusal(lambda: model(torch.ones(2, 16, pm.WIDTH)))


class Scaled(pm.SelfAttention):
    """Attention, times a number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.by


def other_graphs() -> str:
    model = compiled(Scaled([2.0, 3.0][dist.get_rank()]))
    return refusal(lambda: model(torch.ones(2, 16, pm.WIDTH)))


def recompiles_alone() -> str:
    """Rank 1 passes a length that it has not compiled, while rank 0 runs what it has."""
    model = compiled(gpt())
    model(ids(16)).sum().backward()
    return refusal(lambda: model(ids(16 if dist.get_rank() == 0 else 24)))


def other_cached_graph() -> str:
    """All have compiled both, but run different ones."""
    model = compiled(gpt())
    for length in (16, 24):
        with torch.no_grad():
            model(ids(length))
    with torch.no_grad():
        return refusal(lambda: model(ids(16 if dist.get_rank() == 0 else 24)))


class Dropped(nn.Module):
    """Without attention, so that nothing of it is sharded."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


def draws_other_numbers() -> str:
    model = compiled(Dropped())
    torch.manual_seed(dist.get_rank())
    return refusal(lambda: model(torch.ones(2, 4)))


@pytest.mark.thinned(10)
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (other_lengths, ["(2, 16)", "(2, 17)"]),
        (other_dtypes, ["float32", "float64"]),
        (other_options, ["attention='ring'", "attention='ulysses'"]),
        (one_typo, ["went on", "SP102", "did you mean 'ring'?"]),
        (breaks_alone, ["went on", "SP301", "print(x.sum())"]),
        (other_graphs, ["the compiled graphs differ at line", ", 2.0)", ", 3.0)"]),
        (recompiles_alone, ["(2, 16)", "(2, 24)"]),
        (other_cached_graph, ["(2, 16)", "(2, 24)"]),
        (draws_other_numbers, ["random state", "seed 0", "seed 1"]),
    ],
)
def test_ranks_that_differ(worker_pool: PoolOf, mistake: Callable[[], str], words: list[str]) -> None:
    text = same_text(worker_pool(2).run(mistake, timeout=SECONDS + 30))
    assert text.startswith("SP201 ranks disagree")
    assert all(word in text for word in ["rank 0", "rank 1", *words]), text


def options_refused(options: dict[str, Any]) -> str:
    model = compiled(gpt(), **options)
    return refusal(lambda: model(ids()))


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"atention": "ring"}, ["SP101", "'atention'", "did you mean 'attention'?", "legal: "]),
        ({"attention": "rings"}, ["SP102", "attention='rings'", "did you mean 'ring'?", "'ulysses'"]),
        ({"mesh": "cp"}, ["SP103", "mesh='cp'", "DeviceMesh"]),
        ({"compiler": 3}, ["SP102", "compiler=3", "'inductor', 'eager'"]),
    ],
)
def test_options(worker_pool: PoolOf, options: dict[str, Any], words: list[str]) -> None:
    text = same_text(worker_pool(2).run(options_refused, options, timeout=SECONDS))
    assert all(word in text for word in words), text


def unknown_axis() -> str:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("context",))
    return options_refused({"mesh": mesh})


def test_unknown_axis(worker_pool: PoolOf) -> None:
    text = same_text(worker_pool(2).run(unknown_axis, timeout=SECONDS))
    assert all(word in text for word in ("SP103", "'context'", "dp, tp, cp")), text


class Breaks(nn.Module):
    """Asks for a number in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = pm.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        print(x.sum())
        return x * 2


def graph_break() -> str:
    model = compiled(Breaks())
    return refusal(lambda: model(torch.ones(2, 16, pm.WIDTH)))


def test_graph_break(worker_pool: PoolOf) -> None:
    text = same_text(worker_pool(2).run(graph_break, timeout=SECONDS))
    assert text.startswith("SP301")
    assert "print(x.sum())" in text


class ByKey(nn.Module):
    """Rows of the sequence in an order that the rows themselves tell."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = pm.SelfAttention(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        return y.index_select(1, y[0, :, 0].argsort())


def strict() -> str:
    model = compiled(ByKey(), strict=True)
    return refusal(lambda: model(torch.ones(2, 16, pm.WIDTH)))


@pytest.mark.thinned(4)
def test_strict(worker_pool: PoolOf) -> None:
    text = same_text(worker_pool(2).run(strict, timeout=SECONDS))
    assert text.startswith("SP401")
    assert "y.index_select(1" in text


def test_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    text = refusal(lambda: compiled(gpt())(ids()))
    assert text.startswith("SP104 no process group: WORLD_SIZE is 2")
    assert "init_process_group()" in text


def a_mode_on_one_rank() -> str:
    mode = "max-autotune" if dist.get_rank() == 1 else None
    model = torch.compile(models.build("gpt-tiny"), backend="spcompile", mode=mode)
    return refusal(lambda: model(ids(), ids()))


@pytest.mark.thinned(2)
def test_a_mode_is_refused_by_name_on_every_rank(worker_pool: PoolOf) -> None:
    text = same_text(worker_pool(2).run(a_mode_on_one_rank, timeout=SECONDS))
    assert "SP102" in text
    assert "mode='max-autotune': not supported" in text
