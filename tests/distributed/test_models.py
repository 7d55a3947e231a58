"""gpt, llama and bert on real processes: loss, logits, gradients and a step, against the plain model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, assert_same
from torch import Tensor
from worker_pool import WorkerPool

from spcompile import models

PoolOf = Callable[[int], WorkerPool]
IGNORED = -100


def tokens(number: int, *, length: int, batch: int = 2, labels: bool = True) -> dict[str, Tensor]:
    """Token ids and, with `labels`, the same as labels, the first third of row 0 ignored."""
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, 64, (batch, length), generator=generator)
    if not labels:
        return {"ids_BS": ids_BS}
    labels_BS = ids_BS.clone()
    labels_BS[0, : length // 3] = IGNORED
    return {"ids_BS": ids_BS, "labels_BS": labels_BS}


def outer_loss(logits_BSV: Tensor, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(logits_BSV.flatten(0, 1), batch["ids_BS"].flatten())


@pytest.mark.thinned(3, covers=["attention"])
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("model", ["gpt-tiny", "llama-tiny", "bert-tiny"])
def test_two_ranks(worker_pool: PoolOf, model: str, attention: str) -> None:
    case = Case(partial(models.build, model), partial(tokens, length=32), options={"attention": attention})
    assert_same(worker_pool(2), case)


@pytest.mark.slow
@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("model", "attention"), [("llama-tiny", "ulysses"), ("gpt-tiny", "ring"), ("bert-tiny", "auto")]
)
def test_four_ranks(worker_pool: PoolOf, model: str, attention: str) -> None:
    case = Case(partial(models.build, model), partial(tokens, length=45), options={"attention": attention})
    assert_same(worker_pool(4), case)
