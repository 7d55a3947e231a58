"""Ulysses inside a ring on four real processes, whose groups are parts of an axis; Ulysses for any heads on three."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hf_models
import plain_models as pm
import pytest
import torch
from oracle import EXACT, FLOAT32_INSIDE, Case, assert_same
from torch import Tensor
from worker_pool import WorkerPool

from spcompile import models

PoolOf = Callable[[int], WorkerPool]
HYBRID = {"ulysses": 2, "ring": 2}


def hugging_face(name: str, kind: str, length: int, **options: Any) -> Case:
    inputs = partial(hf_models.inputs, model=name, kind=kind, length=length)
    return Case(partial(hf_models.build, name), inputs, options=options)


def test_four_ranks_in_two_groups(worker_pool: PoolOf) -> None:
    """Softcap, ALiBi, a window and sinks; two attentions that use the same groups."""
    outcomes = assert_same(worker_pool(4), Case(pm.Scored, pm.sequence_first, options={"attention": HYBRID}))
    assert not {"SPR101", "SPR201", "SPR202", "SPR204"} & set(outcomes[0].remarks)


@pytest.mark.slow
@pytest.mark.thinned(10)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("length", [32, 63])
@pytest.mark.parametrize("model", [("llama", "packed"), ("mistral", "left padding"), ("bert", "right padding")])
def test_hugging_face(worker_pool: PoolOf, model: tuple[str, str], length: int, compiler: str) -> None:
    name, kind = model
    case = hugging_face(name, kind, length, attention="hybrid", compiler=compiler)
    tolerance = FLOAT32_INSIDE if name in hf_models.LOSS_IN_FLOAT32 else EXACT
    assert_same(worker_pool(4), case, tolerance)


@pytest.mark.slow
@pytest.mark.thinned(8)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_four_heads_on_three_ranks(worker_pool: PoolOf, compiler: str) -> None:
    options = {"attention": "ulysses", "compiler": compiler}
    outcomes = assert_same(worker_pool(3), Case(pm.Scored, pm.sequence_first, options=options))
    assert "SPR204" not in outcomes[0].remarks


@pytest.mark.slow
@pytest.mark.thinned(8)
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_hugging_face_on_three_ranks(worker_pool: PoolOf, compiler: str) -> None:
    case = hugging_face("llama", "right padding", 32, attention="ulysses", compiler=compiler)
    assert_same(worker_pool(3), case, FLOAT32_INSIDE)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["first apart", "apart"])
def test_heads_in_groups_on_two_ranks(worker_pool: PoolOf, way: str, compiler: str) -> None:
    passes = {"split-all-to-alls": {"groups": 2, "way": way}}
    options = {"attention": "ulysses", "passes": passes, "compiler": compiler}
    outcomes = assert_same(worker_pool(2), Case(pm.Scored, pm.sequence_first, options=options))
    assert "SPR205" in outcomes[0].remarks


def growing(number: int) -> dict[str, Tensor]:
    """A length that is a symbol, and divides by nothing for most batches."""
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, 64, (2, 24 + 9 * number), generator=generator)
    torch._dynamo.mark_dynamic(ids_BS, 1)
    return {"ids_BS": ids_BS, "labels_BS": ids_BS}


@pytest.mark.slow
@pytest.mark.thinned(10)
@pytest.mark.parametrize("attention", [HYBRID, "ulysses"], ids=str)
def test_a_dynamic_length(worker_pool: PoolOf, attention: object) -> None:
    case = Case(
        partial(models.build, "llama-tiny", layers=1),
        growing,
        options={"attention": attention},
        micro_batches=(0, 1, 2),
    )
    outcomes = assert_same(worker_pool(4), case)
    assert len(outcomes[0].graphs) == 2
