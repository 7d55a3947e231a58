"""Messages from rank to rank, as requests that an algorithm yields, and the two drivers that answer them.

An algorithm with a loop of messages (ring attention, matmuls in chunks) is a generator of `Shift` and `Wait`. `drive`
runs one rank of it over a process group, `drive_all` all ranks of it in one process, in lockstep.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.profiler import record_function

if TYPE_CHECKING:
    from torch import Tensor

WAIT = "spx::wait"  # the range of a profile in which a rank waits for a message


@dataclass(frozen=True, eq=False)
class Shift:
    """Start to send `message` to the rank `distance` further on; the answer is a handle.

    All ranks yield the same sequence of requests with messages of one shape. The message must not change until waited.
    into: a contiguous tensor in which the message from the rank before arrives; a new one by default.
    """

    message: Tensor
    distance: int = 1
    into: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Wait:
    """Finish a `Shift`; the answer is the message of the rank `distance` before this one."""

    handle: Any


T = TypeVar("T")
Requests = Generator[Shift | Wait, Any, T]


@dataclass(eq=False)
class _InFlight:
    """A shift until it is waited for: then it lets go of what it sent and received, whoever still holds it."""

    received: Tensor | None
    works: list[dist.Work]
    sent: Tensor | None

    @classmethod
    def start(cls, shift: Shift, group: dist.ProcessGroup, tag: int) -> _InFlight:
        """Send and receive."""
        rank, size = group.rank(), group.size()
        message = shift.message.contiguous()
        received = torch.empty_like(message) if shift.into is None else shift.into
        to, source = (rank + shift.distance) % size, (rank - shift.distance) % size
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, message, group=group, group_peer=to, tag=tag),
                dist.P2POp(dist.irecv, received, group=group, group_peer=source, tag=tag),
            ]
        )
        return cls(received, works, message)

    def wait(self) -> Tensor:
        """What has arrived."""
        with record_function(WAIT):
            for work in self.works:
                work.wait()
        received = self.received
        assert received is not None
        self.received, self.works, self.sent = None, [], None
        return received


def drive(requests: Requests[T], group: dist.ProcessGroup) -> T:
    """Run one rank over a process group: every shift is one send and one receive, in flight until waited."""
    answer: Any = None
    tag = 0
    while True:
        try:
            request: Shift | Wait | None = requests.send(answer)
        except StopIteration as stop:
            return stop.value
        if isinstance(request, Shift):
            answer = _InFlight.start(request, group, tag)
            tag += 1
        elif isinstance(request, Wait):
            answer = request.handle.wait()
        request = None  # it would hold its message while the algorithm goes on


@dataclass(eq=False)
class _Posted:
    """A shift in the simulator: `received` is NaN until waited."""

    rank: int
    number: int
    shift: Shift
    snapshot: Tensor
    received: Tensor


@dataclass
class _Rank:
    requests: Requests[Any]
    posted: list[_Posted] = field(default_factory=list)
    waits_for: _Posted | None = None
    answer: Any = None
    done: bool = False
    result: Any = None


class RingDeadlock(AssertionError):
    """Ranks that wait for a message nobody sends, or that do not send the same messages: a bug of the algorithm."""


def drive_all(ranks: Sequence[Requests[T]]) -> list[T]:
    """Run all ranks in this process. A message is delivered when it is waited for; before that it reads as NaN.

    Raises:
        RingDeadlock: a wait that cannot end, shifts that differ between ranks, a shift that nobody waits for, or a
            message that was overwritten while it travelled.
    """
    states = [_Rank(requests) for requests in ranks]
    while not all(state.done for state in states):
        moved = [_advance(states, rank) for rank in range(len(states))]
        if not any(moved):
            raise RingDeadlock(f"ranks {[r for r, s in enumerate(states) if not s.done]} wait for messages never sent")
    for rank, state in enumerate(states):
        if len(state.posted) != len(states[0].posted):
            raise RingDeadlock(f"rank {rank} made {len(state.posted)} shifts, rank 0 made {len(states[0].posted)}")
    return [state.result for state in states]


def _advance(states: list[_Rank], rank: int) -> bool:
    """Run one rank until it waits for a message that is not there; whether it made a step."""
    state = states[rank]
    moved = False
    while not state.done:
        if state.waits_for is not None:
            if not _deliver(states, state.waits_for):
                return moved
            state.answer, state.waits_for = state.waits_for.received, None
        moved = True
        try:
            request = state.requests.send(state.answer)
        except StopIteration as stop:
            state.done, state.result = True, stop.value
            break
        if isinstance(request, Shift):
            message = request.message
            received = torch.empty_like(message) if request.into is None else request.into
            received.fill_(torch.nan)
            state.answer = _Posted(rank, len(state.posted), request, message.clone(), received)
            state.posted.append(state.answer)
        else:
            state.waits_for = request.handle
    return moved


def _deliver(states: list[_Rank], posted: _Posted) -> bool:
    """Fill the receive buffer of a shift, if its sender has got that far."""
    source = states[(posted.rank - posted.shift.distance) % len(states)]
    if len(source.posted) <= posted.number:
        return False
    sent = source.posted[posted.number]
    mine, theirs = posted.shift.message, sent.shift.message
    if (mine.shape, mine.dtype, posted.shift.distance) != (theirs.shape, theirs.dtype, sent.shift.distance):
        raise RingDeadlock(f"shift {posted.number} of ranks {posted.rank} and {sent.rank} differ")
    if not torch.equal(posted.snapshot, mine) and not posted.snapshot.isnan().any():
        raise RingDeadlock(f"rank {posted.rank} overwrote the message of shift {posted.number} before waiting for it")
    posted.received.copy_(sent.snapshot)
    return True
