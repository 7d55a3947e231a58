"""All models times all inputs times both strategies on 2 real processes, and a part of that on 3 and 4. Slow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hf_models import INPUTS, LOSS_IN_FLOAT32, MODELS, build, inputs, outer_loss
from oracle import EXACT, FLOAT32_INSIDE, Case, assert_same
from sampled import sampled
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
pytestmark = pytest.mark.slow

STRATEGIES = ["ring", "ulysses"]
# BERT has no cache.
COMBINATIONS = [case for case in sampled(2, MODELS, INPUTS, STRATEGIES) if case.values[:2] != ("bert", "cache")]


def check(pool: WorkerPool, model: str, kind: str, length: int = 32, **options: Any) -> None:
    outside = kind == "no labels"
    arguments = partial(inputs, model=model, kind=kind, length=length)
    case = Case(partial(build, model), arguments, outer_loss if outside else None, options)
    assert_same(pool, case, FLOAT32_INSIDE if model in LOSS_IN_FLOAT32 and not outside else EXACT)


@pytest.mark.parametrize(("model", "kind", "attention"), COMBINATIONS)
def test_two_ranks(worker_pool: PoolOf, model: str, kind: str, attention: str) -> None:
    check(worker_pool(2), model, kind, attention=attention)


@pytest.mark.parametrize(("model", "attention"), sampled(2, MODELS, STRATEGIES))
def test_four_ranks(worker_pool: PoolOf, model: str, attention: str) -> None:
    check(worker_pool(4), model, "right padding", attention=attention)


@pytest.mark.parametrize("model", MODELS)
def test_auto(worker_pool: PoolOf, model: str) -> None:
    """Takes one of the two for each attention, so one kind of input each will do."""
    check(worker_pool(2), model, "plain", attention="auto")


@pytest.mark.parametrize(
    ("world", "length", "model"), sampled(2, [2, 3, 4], [63, 65, 1000], [("llama", "ring"), ("bert", "ulysses")])
)
def test_lengths(worker_pool: PoolOf, world: int, length: int, model: tuple[str, str]) -> None:
    """Three ranks divide neither the heads nor most lengths."""
    name, attention = model
    check(worker_pool(world), name, "right padding", length, attention=attention)
