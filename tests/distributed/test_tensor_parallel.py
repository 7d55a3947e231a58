"""Axis tp, alone and with cp, on real processes: loss, outputs, gradients and a step, against the plain model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from oracle import EXACT, FLOAT32, FLOAT32_INSIDE, Case, Outcome, compare
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

from spcompile import models

PoolOf = Callable[[int], WorkerPool]


def on_mesh(case: Case, mesh: dict[str, int]) -> Outcome:
    """`compare` on one rank, on a mesh of these axes."""
    made = init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    assert made.size() == dist.get_world_size()
    options = {**case.options, "mesh": made}
    return compare(Case(case.build, case.inputs, case.loss, options, case.dtype, case.micro_batches, case.wrap))


def agrees(pool: WorkerPool, case: Case, mesh: dict[str, int], tolerance: float) -> list[Outcome]:
    outcomes = pool.run(on_mesh, case, mesh)
    for outcome in outcomes:
        assert all(error <= tolerance for error in outcome.errors.values()), outcome.worst()
    assert outcomes[0].graphs, "nothing was compiled for several ranks"
    assert all(outcome.graphs == outcomes[0].graphs for outcome in outcomes), "the ranks' graphs differ"
    return outcomes


def tokens(number: int, *, length: int, vocab: int = 64) -> dict[str, Tensor]:
    """Ids, and the same as labels, a third of one row ignored."""
    ids_BS = torch.randint(0, vocab, (2, length), generator=torch.Generator().manual_seed(number))
    labels_BS = ids_BS.clone()
    labels_BS[0, : length // 3] = -100
    return {"ids_BS": ids_BS, "labels_BS": labels_BS}


def plain(name: str, length: int = 32, settings: dict[str, Any] | None = None, **options: Any) -> Case:
    sizes = {"layers": 1, **(settings or {})}
    inputs = partial(tokens, length=length, vocab=sizes.get("vocab", 64))
    return Case(partial(models.build, name, **sizes), inputs, options=options)


def hugging_face(name: str, **options: Any) -> Case:
    build: Callable[[], nn.Module] = partial(hf_models.build, name)
    return Case(build, partial(hf_models.inputs, model=name, kind="plain", length=16), options=options)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt-tiny"])
def test_two_ranks(worker_pool: PoolOf, name: str) -> None:
    agrees(worker_pool(2), plain(name), {"tp": 2}, EXACT)


@pytest.mark.slow
@pytest.mark.thinned(2)
def test_gpt2(worker_pool: PoolOf) -> None:
    agrees(worker_pool(2), hugging_face("gpt2"), {"tp": 2}, FLOAT32_INSIDE)


@pytest.mark.slow
@pytest.mark.thinned(2)
@pytest.mark.parametrize(("name", "attention"), [("llama-tiny", "ring"), ("gpt-tiny", "ulysses")])
def test_with_context_parallelism(worker_pool: PoolOf, name: str, attention: str) -> None:
    agrees(worker_pool(4), plain(name, 30, attention=attention), {"tp": 2, "cp": 2}, EXACT)


@pytest.mark.slow
@pytest.mark.thinned(10)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("mesh", [{"tp": 2, "cp": 2}, {"cp": 2, "tp": 2}, {"tp": 4}], ids=str)
@pytest.mark.parametrize("name", ["llama-tiny", "bert-tiny"])
def test_four_ranks(worker_pool: PoolOf, name: str, mesh: dict[str, int], attention: str) -> None:
    agrees(worker_pool(4), plain(name, 45, {"layers": 2}, attention=attention), mesh, EXACT)


@pytest.mark.slow
@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_hugging_face_on_four_ranks(worker_pool: PoolOf, name: str) -> None:
    agrees(worker_pool(4), hugging_face(name), {"tp": 2, "cp": 2}, FLOAT32_INSIDE)


@pytest.mark.slow
@pytest.mark.thinned(2)
def test_hugging_face_llama(worker_pool: PoolOf) -> None:
    agrees(worker_pool(2), hugging_face("llama"), {"tp": 2}, FLOAT32_INSIDE)


@pytest.mark.slow
@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt-tiny"])
def test_three_ranks_divide_nothing(worker_pool: PoolOf, name: str) -> None:
    """4 heads, 2 key/value heads, 65 classes, 50 hidden features, 32 positions."""
    settings = {"vocab": 65} | ({"hidden": 50} if name == "llama-tiny" else {})
    outcomes = agrees(worker_pool(3), plain(name, 32, settings), {"tp": 3}, EXACT)
    assert "SPR503" in outcomes[0].remarks


@pytest.mark.slow
@pytest.mark.thinned(4)
@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_inductor(worker_pool: PoolOf, name: str, regather: bool) -> None:
    case = plain(name, compiler="inductor", regather=regather)
    agrees(worker_pool(2), case, {"tp": 2}, EXACT)


@pytest.mark.slow
@pytest.mark.thinned(4)
@pytest.mark.parametrize("mesh", [{"tp": 4}, {"tp": 2, "cp": 2}], ids=str)
def test_float32_and_two_micro_batches(worker_pool: PoolOf, mesh: dict[str, int]) -> None:
    case = plain("llama-tiny")
    case = Case(case.build, case.inputs, dtype=torch.float32, micro_batches=(0, 1))
    agrees(worker_pool(4), case, mesh, FLOAT32)
