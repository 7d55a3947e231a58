"""Mixtures of experts on two real ranks: each sorts or picks its own rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mixtures as mx
import pytest
from oracle import Case, assert_same
from torch import nn
from worker_pool import WorkerPool


def batch(number: int) -> dict[str, Any]:
    return {"x_BSD": mx.states(number=number)}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize(
    "build", [mx.grouped_mixture, partial(mx.Mixture, mx.added_to_tokens), partial(mx.Mixture, mx.picked_and_written)]
)
def test_on_two_ranks(worker_pool: Callable[[int], WorkerPool], build: Callable[[], nn.Module], attention: str) -> None:
    pytest.importorskip("transformers")
    case = Case(build, batch, options={"attention": attention}, micro_batches=(0, 1))
    outcomes = assert_same(worker_pool(2), case)
    assert not mx.GATHERS & set(outcomes[0].remarks)
