"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

AUTOGRAD_CACHE = "TORCHINDUCTOR_AUTOGRAD_CACHE"
os.environ.pop(AUTOGRAD_CACHE, None)  # inherited from pytest's first process, it would overrule tests of the cache

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
from worker_pool import WorkerPool  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests that need processes run in one of pytest's own processes, so that a run spawns each pool once.

    Of the cases of a test that is marked sample(n), all but every n-th are slow. Of the slow cases of one test, all but
    every ninth one are long as well: CI has no time for all of them.
    First of all hooks: xdist reads the marks in its own.
    """
    fast_cases: Counter[str] = Counter()
    slow_cases: Counter[str] = Counter()
    for item in items:
        if "worker_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
        test, sample = item.nodeid.partition("[")[0], item.get_closest_marker("sample")
        if item.get_closest_marker("long"):
            continue
        if sample is not None and not item.get_closest_marker("slow"):
            if fast_cases[test] % sample.args[0]:
                item.add_marker(pytest.mark.slow)
            fast_cases[test] += 1
        if item.get_closest_marker("slow"):
            if slow_cases[test] % 9:
                item.add_marker(pytest.mark.long)
            slow_cases[test] += 1


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector, which each compile runs, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Two of pytest's processes share two cores: one thread each. Tests look at compiles: none is left out."""
    torch._functorch.config.enable_autograd_cache = False
    os.environ[AUTOGRAD_CACHE] = "0"  # of processes that tests start
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[Callable[[int], WorkerPool]]:
    """`worker_pool(2)`: the session's pool of that many processes."""
    pools: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        return pools.setdefault(world_size, WorkerPool(world_size))

    yield pool
    for opened in pools.values():
        opened.close()


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Each test starts from the same seed and leaves no compiled code behind."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
