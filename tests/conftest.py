"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator

import pytest
from thinning import commits, left_out
from worker_pool import WorkerPool

AUTOGRAD_CACHE = "TORCHINDUCTOR_AUTOGRAD_CACHE"
os.environ.pop(AUTOGRAD_CACHE, None)  # inherited from pytest's first process, it would overrule tests of the cache


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("thinning")
    group.addoption("--thinning-seed", type=int, help="which cases of thinned tests run (default: number of commits)")
    group.addoption("--all-cases", action="store_true", help="run all cases of thinned tests")


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.option.thinning_seed
    if is_whole(config):
        return "thinning: none, every case runs"
    return f"thinning: seed {seed}; another one with --thinning-seed N, every case with --all-cases"


def is_whole(config: pytest.Config) -> bool:
    """Whether every case runs: where that is asked for, or where the command names tests of a file."""
    return config.option.all_cases or any("::" in argument for argument in config.args)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thin out; see docs/testing.md. First of all hooks: xdist reads the marks in its own.

    All tests that need processes run in one of pytest's own processes, so that a run spawns each pool once.
    """
    for item in items:
        if "worker_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("processes"))
    try:
        left = set() if is_whole(config) else left_out(items, config.option.thinning_seed)
    except pytest.UsageError as error:
        if hasattr(config, "workerinput"):  # of an error while it collects, a process of xdist says nothing
            print(error, file=sys.__stderr__)
        raise
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector, which each compile runs, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Two of pytest's processes share two cores: one thread each. Tests look at compiles: none is left out.

    The first process, which the others wait for, runs no tests where there are others: it need not import torch.
    """
    if config.option.thinning_seed is None:  # pytest's other processes get the first one's options
        config.option.thinning_seed = commits()
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    import torch
    import torch._functorch.config

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Kernels on one thread: what they hold for each is no part of a plan."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Each test starts from the same seed and leaves no compiled code behind."""
    import torch

    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
