"""What each rank does for `spcompile doctor`: versions and clocks are compared, and every collective runs once checked.

Operands hold small whole numbers, of which all sums are exact: what a rank gets must equal the collective's
specification, which computes all ranks' results from all ranks' operands.
"""

from __future__ import annotations

import functools
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spcompile.collectives import COLLECTIVES, Call, Collective
from spcompile.collectives.point_to_point import Requests, Shift, Wait, drive
from spcompile.command.train import join_processes
from spcompile.plain_text import one_line

LENGTH = 1000  # elements of the dim that is split: no multiple of most numbers of ranks, so that ends are padded
ROUNDS_OF_CLOCKS = 8
TIMEOUT = timedelta(seconds=60)  # for what takes milliseconds where it works


@dataclass(frozen=True)
class CollectiveCheck:
    """How a collective did. wrong: what was wrong with it, on the first rank that found something."""

    name: str
    calls: int
    seconds: float
    wrong: str | None


@dataclass(frozen=True)
class RanksFound:
    """What ranks found together; hosts and versions by rank."""

    backend: str
    device: str
    hosts: list[str]
    versions: list[str]
    clock_seconds: float
    checks: list[CollectiveCheck]


def check_ranks() -> RanksFound:
    """The same on every rank. A rank on which a collective fails, or takes too long, says so and ends the process."""
    with join_processes(TIMEOUT) as device:
        try:
            return found_by_ranks(device)
        except CollectiveFailsError as error:
            print(one_line(f"rank {dist.get_rank()}: {error}"), file=sys.stderr, flush=True)
            os._exit(1)  # what runs at exit would wait for the other ranks


def found_by_ranks(device: str) -> RanksFound:
    """In a process group.

    Raises:
        CollectiveFailsError: nothing can be told to other ranks any more.
    """
    hosts = _from_all(socket.gethostname())
    own = f"spcompile {version('spcompile')}, torch {torch.__version__}, Python {platform.python_version()}"
    checks = [_checked(name, run, device) for name, run in _runs(dist.get_world_size(), device)]
    return RanksFound(dist.get_backend(), device, hosts, _from_all(own), _clock_seconds(), checks)


class CollectiveFailsError(RuntimeError):
    """A collective raised an error, or did not end in time."""


Run = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def _runs(ranks: int, device: str) -> Iterator[tuple[str, Run]]:
    """Names, and what gives pairs of a result and what it must be."""
    for collective in COLLECTIVES.values():
        calls = list(collective.examples(LENGTH, ranks))
        yield collective.name, functools.partial(_pairs, collective, calls, device)
    yield "ring", functools.partial(_around, device)


def _pairs(collective: Collective, calls: list[Call], device: str) -> Iterator[tuple[Tensor, Tensor]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    for i, call in enumerate(calls):
        source, _ = collective.signature(call.arguments)
        parts = [_numbers(call.shape, device, i if source in "IR" else i + 100 * (other + 1)) for other in range(ranks)]
        wanted = collective.spec(parts, **call.arguments)[rank]
        given: dict[str, Any] = {**call.arguments, "axis": group.group_name}
        yield (call.op or collective.op)(parts[rank], **given), wanted


def _numbers(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    drawn = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return drawn.to(device)


def _around(device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A message goes once around, as keys and values do in ring attention."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None

    def algorithm() -> Requests[Tensor]:
        message = _numbers((LENGTH,), device, rank)
        for _ in range(dist.get_world_size()):
            handle = yield Shift(message, 1)
            message = yield Wait(handle)
        return message

    yield drive(algorithm(), group), _numbers((LENGTH,), device, rank)


def _checked(name: str, run: Run, device: str) -> CollectiveCheck:
    """Twice: the first round makes connections and is not timed."""
    wrong = None
    seconds, calls = 0.0, 0
    for is_timed in (False, True):
        try:
            dist.barrier()
            start = time.perf_counter()
            pairs = list(run())
            if device == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as error:
            raise CollectiveFailsError(f"{name} fails: {error}") from error
        seconds, calls = (time.perf_counter() - start if is_timed else 0.0), len(pairs)
        bad = sum(not torch.equal(found, wanted) for found, wanted in pairs)
        if bad:
            wrong = f"rank {dist.get_rank()}: {bad} of {calls} results are wrong"
    of_all = _from_all((wrong, seconds))
    first = next((text for text, _ in of_all if text is not None), None)
    return CollectiveCheck(name, max(calls, 1), max(took for _, took in of_all), first)


def _clock_seconds() -> float:
    """By how much wall clocks differ, at most: of several rounds the one in which the barrier let all go at once."""
    spreads = []
    for _ in range(ROUNDS_OF_CLOCKS):
        dist.barrier()
        times = _from_all(time.time())
        spreads.append(max(times) - min(times))
    return min(spreads)


def _from_all(own: Any) -> list[Any]:
    found: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
