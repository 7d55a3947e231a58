"""Ranks in processes of their own, for tests in which some of them die or sleep: they cannot share a pool's.

    answers = run_ranks(function, world_size)    # rank -> what function() returned; None if it died

Processes are forked from the server that the pools' are forked from.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from worker_pool import IMPORTED, environment_of_ranks, load_function

GRACE_SECONDS = 20.0  # how long the others may still take after one has answered
START_SECONDS = 90.0  # also the timeout of the process group, until `shorten_timeout`


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    until: float = 60.0,
    enough: int | None = None,
    store_in_rank_0: bool = False,
) -> list[Any]:
    """Call `function(*arguments)` on new ranks; answers after `until` seconds are none.

    enough: so many ranks answer, and the others are not waited for; by default all.
    store_in_rank_0: the store of the process group dies with rank 0; else it is a file.
    """
    source = (function.__module__, inspect.getfile(function), function.__qualname__)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory(prefix="spcompile-ranks-") as folder:
        pipes: list[Connection] = []
        processes = []
        store = f"tcp://127.0.0.1:{_free_port()}" if store_in_rank_0 else f"file://{folder}/store"
        for rank in range(world_size):
            here, there = context.Pipe()
            given = (rank, world_size, store, there, source, arguments)
            processes.append(context.Process(target=_live, args=given, daemon=True))
            with environment_of_ranks():
                processes[-1].start()
            there.close()
            pipes.append(here)
        answers = _collect(pipes, START_SECONDS + until, world_size if enough is None else enough)
        for process in processes:
            process.kill()
            process.join()
    return answers


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shorten_timeout(seconds: float) -> None:
    """The process group's timeout from now on: what was slow to start, has."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    assert dist.group.WORLD is not None
    checked: Any = dist.group.WORLD._get_backend(torch.device("cpu"))
    checked.wrapped_pg._set_default_timeout(timedelta(seconds=seconds))


def _collect(pipes: list[Connection], seconds: float, enough: int) -> list[Any]:
    answers: list[Any] = [None] * len(pipes)
    waiting = dict(enumerate(pipes))
    deadline = time.monotonic() + seconds
    while waiting and enough and (left := deadline - time.monotonic()) > 0:
        ready = wait(list(waiting.values()), timeout=left)
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                answers[rank] = waiting.pop(rank).recv()
                enough -= 1
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            except EOFError:
                answers[rank] = None
    return answers


def _live(rank: int, world_size: int, store: str, pipe: Connection, source: Any, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    start = timedelta(seconds=START_SECONDS)
    dist.init_process_group("gloo", store, rank=rank, world_size=world_size, timeout=start)
    torch.manual_seed(0)
    try:
        value = load_function(*source)(*arguments)
    except BaseException:
        value = traceback.format_exc()
    pipe.send(value)
    pipe.close()
