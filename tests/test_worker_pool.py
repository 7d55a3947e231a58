"""The pool of gloo processes: results, errors, deaths and hangs all come back as they should."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import JobFailed, WorkerPool

PoolOf = Callable[[int], WorkerPool]


@dataclass(frozen=True)
class Scale:
    """An argument whose class only this file defines."""

    by: float


def reduced(x: Tensor, scale: Scale) -> tuple[int, Tensor]:
    x = x * scale.by * (dist.get_rank() + 1)
    dist.all_reduce(x)
    return os.getpid(), x


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no luck")
    dist.barrier()


def dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hangs_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(1000)


def unpicklable() -> object:
    return lambda: None


def settings() -> tuple[int, str, float]:
    return torch.get_num_threads(), os.environ["TORCH_DISTRIBUTED_DEBUG"], torch.rand(()).item()


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_come_back_in_rank_order_and_processes_are_reused(worker_pool: PoolOf, world_size: int) -> None:
    pool, x = worker_pool(world_size), torch.arange(3.0)
    first, second = pool.run(reduced, x, Scale(2.0)), pool.run(reduced, x, Scale(2.0))
    expected = x * sum(range(1, world_size + 1)) * 2
    assert all(torch.equal(value, expected) for _, value in first + second)
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == world_size


def test_workers_are_single_threaded_seeded_and_checked(worker_pool: PoolOf) -> None:
    torch.manual_seed(0)
    expected = (1, "DETAIL", torch.rand(()).item())
    assert worker_pool(2).run(settings) == [expected, expected]
    assert worker_pool(2).run(settings) == [expected, expected]


@pytest.mark.thinned(10)
def test_a_failure_shows_the_traceback_and_the_pool_recovers(worker_pool: PoolOf) -> None:
    pool = worker_pool(2)
    with pytest.raises(JobFailed, match=r"(?s)rank 0: .*rank 1: .*no luck"):
        pool.run(fails_on_rank_1)
    assert pool.run(settings)[0][0] == 1


@pytest.mark.thinned(5)
@pytest.mark.slow
def test_a_death_and_a_hang_are_reported(worker_pool: PoolOf) -> None:
    pool = WorkerPool(2)
    with pytest.raises(JobFailed, match="rank 1: the process died with exit code 7"):
        pool.run(dies_on_rank_1)
    with pytest.raises(JobFailed, match=r"(?s)rank 0: had no answer in 5 s.*hangs_on_rank_0"):
        pool.run(hangs_on_rank_0, timeout=5.0)
    pool.close()


def test_a_result_that_cannot_travel_is_an_error(worker_pool: PoolOf) -> None:
    with pytest.raises(JobFailed, match=r"(?i)pickle"):
        worker_pool(2).run(unpicklable)


def test_a_nested_function_is_refused(worker_pool: PoolOf) -> None:
    with pytest.raises(ValueError, match="not at the top level"):
        worker_pool(2).run(lambda: None)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_one_of_pytests_processes_runs_all_that_spawn(worker_pool: PoolOf, request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@processes")
