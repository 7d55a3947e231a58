"""Hugging Face models on real processes, unchanged: a few of each kind of input; test_matrix has them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hf_models import LOSS_IN_FLOAT32, build, inputs, outer_loss
from oracle import EXACT, FLOAT32, FLOAT32_INSIDE, Case, assert_same
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]


def case_of(model: str, kind: str, *, length: int = 32, layers: int = 1, **options: Any) -> Case:
    loss = outer_loss if kind == "no labels" else None
    arguments = partial(inputs, model=model, kind=kind, length=length)
    return Case(partial(build, model, layers=layers), arguments, loss, options)


def tolerance_of(model: str, kind: str) -> float:
    return FLOAT32_INSIDE if model in LOSS_IN_FLOAT32 and kind != "no labels" else EXACT


@pytest.mark.thinned(30)
@pytest.mark.parametrize(
    ("model", "kind", "attention"),
    [
        ("llama", "plain", "ring"),
        ("llama", "cache", "ulysses"),
        ("llama", "packed", "ring"),
        ("llama", "no labels", "auto"),
        ("mistral", "right padding", "ring"),
        ("mistral", "packed", "ulysses"),
        ("gpt2", "cache", "ring"),
        ("gpt2", "left padding", "ulysses"),
        ("bert", "plain", "ulysses"),
        ("bert", "right padding", "ring"),
    ],
)
def test_inputs(worker_pool: PoolOf, model: str, kind: str, attention: str) -> None:
    case = case_of(model, kind, attention=attention)
    assert_same(worker_pool(2), case, tolerance_of(model, kind))


@pytest.mark.thinned(6)
@pytest.mark.slow
def test_two_layers_on_four_ranks(worker_pool: PoolOf) -> None:
    case = case_of("llama", "no labels", length=45, layers=2)
    assert_same(worker_pool(4), case)


@pytest.mark.thinned(17)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gradient_checkpointing(worker_pool: PoolOf, model: str) -> None:
    arguments = partial(inputs, model=model, kind="plain")
    case = Case(partial(build, model, layers=2, checkpointing=True), arguments)
    assert_same(worker_pool(2), case, FLOAT32_INSIDE)


def counted(number: int) -> dict[str, Any]:
    """The Trainer's call under gradient accumulation: the divisor is the number of tokens in all micro-batches."""
    return inputs(number, model="llama", kind="plain") | {"num_items_in_batch": torch.tensor(97)}


@pytest.mark.thinned(4)
def test_num_items_in_batch_over_two_micro_batches(worker_pool: PoolOf) -> None:
    case = Case(partial(build, "llama"), counted, micro_batches=(0, 1))
    assert_same(worker_pool(2), case, FLOAT32_INSIDE)


@pytest.mark.thinned(8)
def test_float32(worker_pool: PoolOf) -> None:
    case = Case(partial(build, "llama"), partial(inputs, model="llama", kind="plain"), dtype=torch.float32)
    assert_same(worker_pool(2), case, FLOAT32)
