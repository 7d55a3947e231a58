"""A rank that does not come is named on all that wait for it, soon, with what it does instead."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from refusals import compiled, refusal, same_text
from short_lives import run_ranks, shorten_timeout
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from spcompile.program.checked_calls import CheckedCalls

pytestmark = pytest.mark.xdist_group("processes")  # where one server is that has imported torch
TIMEOUT = 4.0
SOON = TIMEOUT + 10.0
MISSING = 1


def trained(steps: int, axis: str = "cp", **options: Any) -> tuple[Callable[[], Tensor], float]:
    """(a loss of a model that has done some steps already, when that was)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    model = compiled(pm.SelfAttention(), mesh=mesh, **options)

    def loss() -> Tensor:
        return model(torch.ones(2, 8, pm.WIDTH)).sum()

    for _ in range(steps):
        loss().backward()
    shorten_timeout(TIMEOUT)
    return loss, time.monotonic()


def killed_before_a_call() -> tuple[str, float]:
    loss, start = trained(2)
    if dist.get_rank() == MISSING:
        os.kill(os.getpid(), signal.SIGKILL)
    return refusal(loss), time.monotonic() - start


def stopped_before_a_call() -> tuple[str, float]:
    loss, start = trained(1)
    if dist.get_rank() == MISSING:
        os.kill(os.getpid(), signal.SIGSTOP)
    return refusal(loss), time.monotonic() - start


def asleep_before_a_call() -> tuple[str, float]:
    loss, start = trained(2)
    if dist.get_rank() == MISSING:
        time.sleep(TIMEOUT + 6.0)
        return refusal(loss), 0.0
    return refusal(loss), time.monotonic() - start


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_inside_a_call() -> tuple[str, float]:
    loss, start = trained(1)
    if dist.get_rank() == MISSING:
        CheckedCalls._inside = die  # type: ignore[method-assign]
    return refusal(loss), time.monotonic() - start


def killed_inside_a_backward() -> tuple[str, float]:
    loss, start = trained(1)
    last = loss()
    if dist.get_rank() == MISSING:
        CheckedCalls._inside = die  # type: ignore[method-assign]
    return refusal(last.backward), time.monotonic() - start


@pytest.mark.thinned(30)
@pytest.mark.parametrize(
    ("happens", "where", "words"),
    [
        (killed_before_a_call, "call 3 of graph", ["rank 1: no answer: its process is killed"]),
        (asleep_before_a_call, "call 3 of graph", ["rank 1: has ended the backward of call 2", "runs no compiled"]),
        pytest.param(stopped_before_a_call, "call 2 of graph", ["rank 1: no answer"], marks=pytest.mark.slow),
        (killed_inside_a_call, "call 2 of graph", ["rank 1: no answer"]),
        (killed_inside_a_backward, "the backward of call 2 of graph", ["rank 1: no answer"]),
    ],
)
def test_a_missing_rank_is_named(happens: Callable[[], Any], where: str, words: list[str]) -> None:
    world_size = 3 if happens is killed_before_a_call else 2
    answering = world_size - (happens is not asleep_before_a_call)
    answers = run_ranks(happens, world_size, enough=answering)
    found = [answer for answer in answers if answer is not None]
    assert len(found) == answering, answers
    text = same_text([text for text, _ in found])
    assert text.startswith(f"SP202 ranks are missing: rank 1 did not come to {where}"), text
    assert all(word in text for word in [*words, "SelfAttention", " since ", "all ranks met last"]), text
    assert all(seconds < SOON for _, seconds in found), found


def gone_while_compared_later(happens: str) -> tuple[str, float]:
    """As on accelerators: the error is that of a later call, or of this call's collective."""
    loss, start = trained(2, compare="later")
    if dist.get_rank() == MISSING and happens == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == MISSING:
        time.sleep(TIMEOUT + 6.0)
    found = refusal(lambda: [loss().backward() for _ in range(3)])
    seconds = time.monotonic() - start
    time.sleep(2.0 if dist.get_rank() == 0 else 0.0)  # a rank that comes late asks the others
    return found, seconds if dist.get_rank() != MISSING else 0.0


@pytest.mark.parametrize(
    ("happens", "ranks"), [("killed", 3), ("asleep", 2), pytest.param("killed", 4, marks=pytest.mark.slow)]
)
@pytest.mark.thinned(30)
def test_a_missing_rank_is_named_where_ranks_compare_later(happens: str, ranks: int) -> None:
    found = [answer for answer in run_ranks(gone_while_compared_later, ranks, happens) if answer is not None]
    assert len(found) == ranks - (happens == "killed"), found
    text = same_text([text for text, _ in found])
    assert text.startswith("SP202 ranks are missing: rank 1 did not come to call 3 of graph"), text
    assert all(seconds < SOON for _, seconds in found), found


def killed_with_the_store() -> tuple[str, float]:
    loss, start = trained(2)
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return refusal(loss), time.monotonic() - start


@pytest.mark.thinned(10)
def test_the_rank_that_holds_the_store_is_killed() -> None:
    dead, *found = run_ranks(killed_with_the_store, 3, store_in_rank_0=True)
    assert dead is None
    for text, seconds in found:
        assert text.startswith("SP202 ranks are missing: not all ranks came to call 3 of graph"), text
        assert "the process that holds it is gone, which is rank 0" in text
        assert seconds < SOON


def one_batch_more(then: str) -> tuple[str, float]:
    loss, start = trained(2, "dp")
    if dist.get_rank() == 0:
        return refusal(loss), time.monotonic() - start
    if then == "barrier":
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    return "has no more batches", 0.0


@pytest.mark.thinned(26)
@pytest.mark.parametrize("then", ["ends", "barrier"])
def test_a_rank_with_one_batch_more(then: str) -> None:
    answer = run_ranks(one_batch_more, 2, then)[0]
    assert answer is not None
    text, seconds = answer
    assert text.startswith("SP202 ranks are missing: rank 1 did not come to call 3 of graph"), text
    assert all(word in text for word in ["the backward of call 2", "as many batches"]), text
    assert seconds < SOON
