"""Where every rank is, asked through the store when one of them is waited for in vain.

Each process has a thread that looks for an alarm in the store. On an alarm it writes down where its process is,
whatever the others of its threads wait for. So the ranks that wait can tell one that is gone from one that does
something else. After an alarm nothing goes on: the first verdict counts, and all ranks raise it, late ones as well.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from spcompile.diagnostics import RanksMissing
from spcompile.program.facts import list_ranks
from spcompile.torch_private_groups import default_store

POLL_SECONDS = 0.5
ANSWER_SECONDS = 4.0
_KEY = "spcompile/roll-call"
_ENDED = "ended"
_NO_ANSWER = "no answer: its process is killed, stopped, or has not called a compiled model yet"
_LEGAL = (
    "as many calls, and backwards of them, on every rank (over dp as many batches: drop_last, or a sampler that pads), "
    "and no pause longer than the timeout of init_process_group"
)


class Whereabouts(NamedTuple):
    """Where a rank is: what it does, since when, and `mark`, which is equal for all ranks that have come so far."""

    doing: str
    since: float
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.doing} since {_clock(self.since)}"


class RollCall:
    """The roll call of one default process group."""

    def __init__(self) -> None:
        self._rank, self._process = dist.get_rank(), os.getpid()
        self._store = default_store()
        self._watched_store = default_store()
        self._ended = threading.Event()
        self.raised = threading.Event()
        self.place = Whereabouts("has compared nothing yet", time.time())
        self._waiting: Whereabouts | None = None  # of any thread: those that compare later run behind the others
        self._met = self.place
        self._watch = threading.Thread(target=self._answer_an_alarm, name="spcompile roll call", daemon=True)
        self._watch.start()
        atexit.register(self._end)

    def at(self, doing: str, mark: str = "") -> None:
        """This rank is here now."""
        self.place = Whereabouts(doing, time.time(), mark)

    def waits(self, where: str, mark: str) -> None:
        """A thread of this rank waits here for the other ranks, until they have met."""
        self._waiting = Whereabouts(f"waits for the others at {where}", time.time(), mark)

    def met(self, where: str) -> None:
        """All ranks were here just now."""
        self._met, self._waiting = Whereabouts(where, time.time()), None

    def missing(self, ranks: Sequence[int], where: str, mark: str, timeout: float) -> RanksMissing:
        """The error, the same on all ranks, that says which of `ranks` have not come to where this one is."""
        return RanksMissing(self._verdict(ranks, where, mark, timeout, may_be_none=False) or "", legal=_LEGAL)

    def missing_if_any(self, ranks: Sequence[int], where: str, mark: str, timeout: float) -> RanksMissing | None:
        """As `missing`; None if all ranks have come, so that something else is wrong."""
        text = self._verdict(ranks, where, mark, timeout, may_be_none=True)
        return RanksMissing(text, legal=_LEGAL) if text is not None else None

    def _places(self) -> list[Whereabouts]:
        return [self._waiting, self.place] if self._waiting is not None else [self.place]

    def _verdict(self, ranks: Sequence[int], where: str, mark: str, timeout: float, may_be_none: bool) -> str | None:
        try:
            if self._store.check([f"{_KEY}/alarm"]):  # who raised it makes the verdict, unless it is gone, too
                with contextlib.suppress(RuntimeError):
                    self._store.wait([f"{_KEY}/verdict"], timedelta(seconds=ANSWER_SECONDS + 1.0))
                    return self._store.get(f"{_KEY}/verdict").decode()
            answers = self._ask(ranks)
            if may_be_none and all(_is_at(mark, places) for places in answers.values()):
                return None
            text = _text(answers, mark, where, timeout, self._met)
            return self._store.compare_set(f"{_KEY}/verdict", "", text).decode()
        except RuntimeError as reason:
            return (
                f"not all ranks came to {where}. The store, through which they would say where they are, does not "
                f"answer: the process that holds it is gone, which is rank 0 unless a launcher holds it\n"
                f"  rank {self._rank}: {self._places()[0]}\n  all ranks met last: {self._met}\n"
                f"  {str(reason).partition(chr(10))[0]:.200}"
            )

    def _ask(self, ranks: Sequence[int]) -> dict[int, list[Whereabouts]]:
        """Raise the alarm and collect the answers; none of a rank that gives none."""
        self._store.set(f"{_KEY}/alarm", "raised")
        answers: dict[int, list[Whereabouts]] = {rank: [] for rank in ranks}
        answers[self._rank] = self._places()
        deadline = time.monotonic() + ANSWER_SECONDS
        while not all(answers.values()) and time.monotonic() < deadline:
            for rank in [rank for rank, places in answers.items() if not places]:
                if self._store.check([f"{_KEY}/{rank}"]):
                    answers[rank] = [Whereabouts(*one) for one in json.loads(self._store.get(f"{_KEY}/{rank}"))]
            time.sleep(POLL_SECONDS / 5)
        return answers

    def _answer_an_alarm(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody can ask any more
            while not self._ended.wait(POLL_SECONDS):
                if self._watched_store.check([f"{_KEY}/alarm"]):
                    self._write(self._places())
                    self.raised.set()
                    return

    def _end(self) -> None:
        if os.getpid() != self._process:
            return  # a forked child ends
        self._ended.set()
        self._watch.join(timeout=2 * POLL_SECONDS)
        with contextlib.suppress(RuntimeError):
            if not self.raised.is_set():
                self._write([Whereabouts(f"has ended its program; before, it {self.place},", time.time(), _ENDED)])

    def _write(self, places: list[Whereabouts]) -> None:
        self._watched_store.set(f"{_KEY}/{self._rank}", json.dumps(places))


def _is_at(mark: str, places: list[Whereabouts]) -> bool:
    return any(place.mark == mark for place in places)


def _text(answers: dict[int, list[Whereabouts]], mark: str, where: str, timeout: float, met: Whereabouts) -> str:
    gone = [rank for rank, places in answers.items() if not places or _is_at(_ENDED, places)]
    absent = gone or [rank for rank, places in answers.items() if not _is_at(mark, places)]
    who = f"{list_ranks(absent)} did not come to" if absent else "all ranks came, but some too late, to"
    rows = [f"  rank {rank}: {places[0] if places else _NO_ANSWER}" for rank, places in sorted(answers.items())]
    return "\n".join([f"{who} {where} (timeout {timeout:g} s)", *rows, f"  all ranks met last: {met}"])


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


@functools.cache
def roll_call_of(world: Any) -> RollCall:
    """The roll call of a default process group."""
    return RollCall()
