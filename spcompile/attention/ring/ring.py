"""Ring attention, written once as generators: what moves is yielded as a request, and a driver decides how it moves.

Every rank keeps its queries; keys and values travel from rank to rank (arXiv 2310.01889). In the backward the gradients
of keys and values travel too, one hop behind, in the accumulation dtype, and at the end go home in one message. Partial
results are never rounded, so the error does not grow with the number of ranks. Keys are not repeated for query heads
that share one, and no hop is made that the mask empties on every rank: from positions that is known when a graph is
compiled, from documents when it runs (`hops`).

B batch, N query heads, G key heads, Sl and Tl local query and key rows, H head size of q and k, V of v.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spcompile.attention.kernels import hop_state
from spcompile.attention.scores.runs import Run, shard_runs
from spcompile.collectives.point_to_point import Requests, Shift, Wait
from spcompile.diagnostics import IllegalOption
from spcompile.machine.sequence import chunk_length, local_length

if TYPE_CHECKING:
    from torch import Tensor

    from spcompile.attention.scores.mask import AttentionMask
    from spcompile.attention.scores.provider import Rows, Scores


@dataclass(frozen=True)
class Ring:
    """The layout of both sequences on the ring.

    q_length, k_length: global lengths; order: of `spcompile.machine.sequence`. Nothing here differs between ranks.
    inner: every rank has the joined rows of so many neighbours, over all of whom the sequences are laid out.
    """

    q_length: int
    k_length: int
    degree: int
    order: str
    inner: int = 1

    def q_runs(self, rank: int) -> tuple[Run, ...]:
        """Where the query rows of `rank` are."""
        return shard_runs(self.q_length, rank, self.degree, self.order, self.inner)

    def k_runs(self, rank: int) -> tuple[Run, ...]:
        """Where the keys of `rank` are."""
        return shard_runs(self.k_length, rank, self.degree, self.order, self.inner)

    def distances(self, mask: AttentionMask) -> tuple[int, ...]:
        """How far keys travel, in ascending order: the distances over which the mask leaves anything on any rank.

        A window that reaches both ways leaves the nearest ranks on either side: (1, degree - 1).
        """
        return _distances(self, mask)

    def stops(self, mask: AttentionMask, hops: Tensor | None) -> tuple[int, ...]:
        """The distances at which a block is computed, 0 among them. hops: see `ring_forward`."""
        needed = None if hops is None else hops.tolist()
        return (0, *(d for d in self.distances(mask) if needed is None or needed[d]))

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raises IllegalOption where the local shapes are not those of this layout."""
        for name, x, length in (("q", q, self.q_length), ("k", k, self.k_length)):
            expected = self.inner * local_length(length, self.inner * self.degree, self.order)
            if x.shape[2] != expected:
                found = f"ring attention: {name} has {x.shape[2]} local rows of a sequence of {length}"
                raise IllegalOption(found, legal=f"{expected} ({self.order} over {self.inner * self.degree} ranks)")


@functools.lru_cache(maxsize=1024)
def _distances(ring: Ring, mask: AttentionMask) -> tuple[int, ...]:
    """Linear in the degree: the keys that a run of queries reaches are a range of chunks, so one or two of ranks."""
    changes = [0] * (2 * ring.degree + 1)  # how many more runs reach distance d - degree than d - 1 - degree
    chunk = ring.inner * chunk_length(ring.k_length, ring.inner * ring.degree, ring.order)
    for rank in range(ring.degree):
        for run in ring.q_runs(rank):
            first, last = mask.reach(run.first, run.last)
            last = ring.k_length - 1 if last is None else min(last, ring.k_length - 1)
            if first > last:
                continue
            for nearest, furthest in _owners(first // chunk, last // chunk, ring.degree):
                changes[rank - furthest + ring.degree] += 1
                changes[rank - nearest + ring.degree + 1] -= 1
    reached = [count > 0 for count in itertools.accumulate(changes)]
    return tuple(d for d in range(1, ring.degree) if reached[d] or reached[d + ring.degree])


def _owners(first: int, last: int, degree: int) -> Iterator[tuple[int, int]]:
    """The ranks that hold chunks first..last, as ranges. Zigzag has a second half, which runs backwards."""
    if first < degree:
        yield first, min(last, degree - 1)
    if last >= degree:
        yield 2 * degree - 1 - last, 2 * degree - 1 - max(first, degree)


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, ring: Ring, rank: int, hops: Tensor | None = None
) -> Requests[tuple[Tensor, Tensor]]:
    """One rank's (out [B, N, Sl, V] in q's dtype, lse [B, N, Sl]); padded rows are 0 and -inf.

    hops: bool [degree] on the host, the same on all ranks: over which distances documents leave anything.
    """
    ring.check(q, k)
    stops = ring.stops(scores.mask, hops)
    q_runs = ring.q_runs(rank)
    if len(stops) == 1:
        return hop_state.forward(q, k, v, q_runs, ring.k_runs(rank), scores, part=rank)
    state = hop_state.start_forward(q, k, v, scores)
    message = pack(k, v)
    for here, further in itertools.zip_longest(stops, stops[1:]):
        handle = None if further is None else (yield Shift(message, further - here))
        part = (rank - here) % ring.degree
        state.add(*unpack(message, k, v), q_runs, ring.k_runs(part), last=further is None, part=part)
        if handle is not None:
            message = yield Wait(handle)
    return state.result()


def ring_backward(
    rows: Rows,
    k: Tensor,
    v: Tensor,
    scores: Scores,
    ring: Ring,
    rank: int,
    wants_grad_bias: bool,
    hops: Tensor | None = None,
) -> Requests[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """One rank's (dq, dk, dv) in the inputs' dtypes and the bias's gradient, float32 or float64, None if not wanted.

    hops: those of the forward.
    """
    ring.check(rows.q, k)
    stops = ring.stops(scores.mask, hops)
    q_runs = ring.q_runs(rank)
    if len(stops) == 1:
        k_runs = ring.k_runs(rank)
        grads, grad_bias = hop_state.backward(rows, k, v, q_runs, k_runs, scores, wants_grad_bias, part=rank)
        return *grads, grad_bias
    state = hop_state.start_backward(rows, k, v, scores, wants_grad_bias)
    message = pack(k, v)
    grad_handle = None
    for here, further in itertools.zip_longest(stops, stops[1:]):
        handle = None if further is None else (yield Shift(message, further - here))
        part = (rank - here) % ring.degree
        is_last = further is None
        grads_here = pack(*state.add(*unpack(message, k, v), q_runs, ring.k_runs(part), last=is_last, part=part))
        if grad_handle is not None:
            grads_here += yield Wait(grad_handle)
        if handle is not None:
            message = yield Wait(handle)
        grad_handle = yield Shift(grads_here, (ring.degree if further is None else further) - here)
    dk, dv = unpack((yield Wait(grad_handle)), k, v)
    dq, grad_bias = state.result()
    return dq, dk.to(k.dtype), dv.to(v.dtype), grad_bias


def pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one message [B, G, Tl, H + V]."""
    return torch.cat([k, v], -1)


def unpack(message: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`, as views."""
    k_part, v_part = message.split([k.shape[-1], v.shape[-1]], -1)
    return k_part, v_part


def message_numbers(batch: int, key_heads: int, rows: int, head_size: int, v_head_size: int) -> int:
    """Numbers in one message: the keys and values of one rank. `rows` is the local length and may be a SymInt."""
    return batch * key_heads * rows * (head_size + v_head_size)


def forward_bytes(numbers: int, hops: int, element: int) -> int:
    """Bytes that each rank sends in the forward: keys and values, once a hop. element: bytes of one number."""
    return hops * numbers * element


def backward_bytes(numbers: int, hops: int, element: int) -> int:
    """Bytes that each rank sends in the backward: keys and values again, and their gradients once more than that.

    Gradients travel in the accumulation dtype: 8 bytes for float64, else 4.
    """
    return numbers * (hops * element + (hops + 1) * max(4, element)) if hops else 0
