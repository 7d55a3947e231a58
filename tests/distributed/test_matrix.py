"""All models times all inputs times all strategies, on 2, 3 and 4 real processes. Slow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hf_models import INPUTS, LOSS_IN_FLOAT32, MODELS, build, inputs, outer_loss
from oracle import EXACT, FLOAT32_INSIDE, Case, assert_same
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
pytestmark = pytest.mark.slow

# BERT has no cache.
COMBINATIONS = [(model, kind) for model in MODELS for kind in INPUTS if (model, kind) != ("bert", "cache")]


def check(pool: WorkerPool, model: str, kind: str, length: int = 32, **options: Any) -> None:
    outside = kind == "no labels"
    arguments = partial(inputs, model=model, kind=kind, length=length)
    case = Case(partial(build, model), arguments, outer_loss if outside else None, options)
    assert_same(pool, case, FLOAT32_INSIDE if model in LOSS_IN_FLOAT32 and not outside else EXACT, timeout=120.0)


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize(("model", "kind"), COMBINATIONS)
@pytest.mark.parametrize("world", [2, 4])
def test_matrix(worker_pool: PoolOf, world: int, model: str, kind: str, attention: str) -> None:
    check(worker_pool(world), model, kind, attention=attention)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", [2, 4])
def test_auto(worker_pool: PoolOf, world: int, model: str) -> None:
    """Takes one of the two for each attention, so one kind of input each will do."""
    check(worker_pool(world), model, "plain", attention="auto")


LENGTHS = [("llama", "ring"), ("llama", "ulysses"), ("gpt2", "ring"), ("bert", "ring")]


@pytest.mark.parametrize(("model", "attention"), LENGTHS)
@pytest.mark.parametrize("length", [63, 65, 1000])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_lengths(worker_pool: PoolOf, world: int, length: int, model: str, attention: str) -> None:
    """Three ranks divide neither the heads nor most lengths: Ulysses, asked for, gives way to the ring."""
    check(worker_pool(world), model, "right padding", length, attention=attention)
