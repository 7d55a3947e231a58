"""A gloo group that ranks compare over: none of the model's collectives runs on it, and none of NCCL's.

It stands beside torch's process groups, unknown to them: so it needs no order of creation with others, and no check of
level DETAIL runs in it. Every wait in it ends: by the others, by a connection that closes, by an alarm of the roll
call, or at the timeout of the default process group.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spcompile.program.roll_call import POLL_SECONDS, RollCall
from spcompile.torch_private_groups import default_store, keep_for_ever

_MADE: Counter[tuple[Any, ...]] = Counter()  # groups of the same ranks, which are made in the same order on all of them


class OwnGroup:
    """Gathers a few numbers of every rank of a mesh. Connects at the first gather."""

    def __init__(self, ranks: Sequence[int], roll_call: RollCall, limit: Callable[[], timedelta]) -> None:
        self.ranks = sorted(ranks)
        self._limit = limit
        self._roll_call = roll_call
        self._group: dist.ProcessGroupGloo | None = None
        key = (dist.group.WORLD, *self.ranks)
        self.name = f"{'.'.join(map(str, self.ranks))}/{_MADE[key]}"
        _MADE[key] += 1

    def timeout(self) -> float:
        """How many seconds ranks wait for each other."""
        return self._limit().total_seconds()

    def gather(self, numbers: Sequence[int], where: str, mark: str) -> dict[int, list[int]]:
        """What each rank passes, at the same place of its program as this one.

        where, mark: as people and as programs call that place.

        Raises:
            RanksMissing: a rank does not come; the same error on all that do.
        """
        self._roll_call.waits(where, mark)
        try:
            found = self._gather(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
        except RuntimeError as reason:
            raise self._roll_call.missing(self.ranks, where, mark, self.timeout()) from reason
        self._roll_call.met(where)
        return found

    def _gather(self, mine: torch.Tensor) -> dict[int, list[int]]:
        if self._roll_call.raised.is_set():
            raise RuntimeError("ranks were missing before")
        group: Any = self._connected()
        parts = [torch.empty_like(mine) for _ in self.ranks]
        work = group.allgather([parts], [mine])
        deadline = time.monotonic() + self.timeout()
        while True:
            try:
                work.wait(timedelta(seconds=POLL_SECONDS))
                return {rank: part.tolist() for rank, part in zip(self.ranks, parts, strict=True)}
            except RuntimeError:
                if work.is_completed():
                    work.wait()
                    continue
                if self._roll_call.raised.is_set() or time.monotonic() > deadline:
                    raise

    def _connected(self) -> dist.ProcessGroupGloo:
        if self._group is None:
            store = dist.PrefixStore(f"spcompile/own/{self.name}", default_store())
            place = self.ranks.index(dist.get_rank())
            self._group = dist.ProcessGroupGloo(store, place, len(self.ranks), self._limit())
            keep_for_ever(self._group)
        return self._group
