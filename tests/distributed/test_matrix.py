"""All models times all inputs times both strategies: on 2 to 4 ranks in the simulator, a part on 4 real processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hf_models import INPUTS, LOSS_IN_FLOAT32, MODELS, build, inputs
from oracle import EXACT, FLOAT32_INSIDE, Case, assert_same, default_dtype
from worker_pool import WorkerPool

from spcompile import verify

PoolOf = Callable[[int], WorkerPool]
pytestmark = pytest.mark.slow

EVERY_MODEL = pytest.mark.parametrize("model", MODELS)
EVERY_STRATEGY = pytest.mark.parametrize("attention", ["ring", "ulysses"])


def tolerance(model: str, kind: str) -> float:
    return FLOAT32_INSIDE if model in LOSS_IN_FLOAT32 and kind != "no labels" else EXACT


def check(world: int, model: str, kind: str, attention: str, length: int = 32) -> None:
    with default_dtype(torch.float64):
        batch = inputs(0, model=model, kind=kind, length=length)
        report = verify(build(model), batch, {"cp": world}, tolerance=tolerance(model, kind), attention=attention)
    assert report.ok, str(report)
    assert not any(remark.code == "SPR101" for remark in report.remarks), "nothing was sharded"


@pytest.mark.thinned(9, covers=["model", "kind", "attention"])
@EVERY_MODEL
@pytest.mark.parametrize("kind", INPUTS)
@EVERY_STRATEGY
def test_two_ranks(model: str, kind: str, attention: str) -> None:
    """BERT has no cache: what it returns is the same."""
    check(2, model, kind, attention)


@pytest.mark.thinned(6)
@EVERY_MODEL
def test_auto(model: str) -> None:
    """Takes one of the two for each attention, so one kind of input each will do."""
    check(2, model, "plain", "auto")


@pytest.mark.thinned(6, covers=["world", "length"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("length", [63, 65, 1000])
@pytest.mark.parametrize("model", [("llama", "ring"), ("bert", "ulysses")])
def test_lengths(world: int, length: int, model: tuple[str, str]) -> None:
    """Three ranks divide neither the heads nor most lengths."""
    name, attention = model
    check(world, name, "right padding", attention, length)


@pytest.mark.thinned(6, covers=["attention"])
@EVERY_MODEL
@EVERY_STRATEGY
def test_four_processes(worker_pool: PoolOf, model: str, attention: str) -> None:
    kind = "right padding"
    case = Case(
        partial(build, model), partial(inputs, model=model, kind=kind, length=32), options={"attention": attention}
    )
    assert_same(worker_pool(4), case, tolerance(model, kind))
