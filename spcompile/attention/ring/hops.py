"""Which hops of a ring documents leave anything to do. Documents are data, so this is asked once a step and mask.

`spx::ring_hops` reads the document ids, which every rank holds whole, and answers for all ranks together: so all ranks
find the same, unless somebody passed other documents on one of them. `spx::agree_on_hops` makes sure of that, since a
rank would wait for ever for a message that another does not send. Its result is on the host; where the ids are on a
GPU, it waits for them.

B batch, S query rows, T keys of the whole sequence, P ranks of the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from spcompile.attention.ring.ring import Ring
from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask
from spcompile.diagnostics import RanksDisagree
from spcompile.machine.sequence import chunk_length, chunks_per_rank
from spcompile.torch_private_groups import resolve_process_group

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_LIBRARY.define(
    "ring_hops(Tensor q_documents, Tensor k_documents, str mask, int degree, str order, int inner) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define("agree_on_hops(Tensor hops, str axis) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def needed_hops(q_documents: Tensor, k_documents: Tensor, mask: AttentionMask, ring: Ring) -> Tensor:
    """Bool [P], on the ids' device: whether some rank has a query that sees a key of the rank so far before it.

    q_documents [B|1, S], k_documents [B|1, T]. Exact where the keys of a document are neighbours; where they are
    scattered, a document reaches from its first key to its last, so that no hop is left out that has to be made.
    """
    chunks = chunks_per_rank(ring.order) * ring.degree
    batch = max(q_documents.shape[0], k_documents.shape[0])
    dtype = torch.promote_types(q_documents.dtype, k_documents.dtype)
    dtype = dtype if dtype.is_floating_point else torch.int64
    q_BS, k_BT = (x.to(dtype).expand(batch, -1).contiguous() for x in (q_documents, k_documents))
    sorted_BT, at_BT = k_BT.sort(dim=1, stable=True)
    first_BS = torch.searchsorted(sorted_BT, q_BS)
    last_BS = torch.searchsorted(sorted_BT, q_BS, right=True) - 1
    seen_BS = first_BS <= last_BS
    end = ring.k_length - 1
    first_BS, last_BS = (at_BT.gather(1, x.clamp(0, end)) for x in (first_BS, last_BS))

    q_S = torch.arange(ring.q_length, device=q_documents.device)
    first_S, last_S = mask.reach_of_each(q_S, ring.k_length)
    first_BS, last_BS = torch.maximum(first_BS, first_S), torch.minimum(last_BS, last_S)
    seen_BS = seen_BS & (first_BS <= last_BS)
    if mask.fill is not None:
        is_open_BS = q_BS == WITHOUT_KEYS
        first_BS, last_BS = first_BS.masked_fill(is_open_BS, 0), last_BS.masked_fill(is_open_BS, end)
        seen_BS = seen_BS | is_open_BS

    # Of every chunk of queries, how many more of them see chunk c of the keys than see chunk c - 1.
    q_chunk, k_chunk = (
        ring.inner * chunk_length(length, ring.inner * ring.degree, ring.order)
        for length in (ring.q_length, ring.k_length)
    )
    line_S = q_S // q_chunk * (chunks + 1)
    count_BS = seen_BS.to(torch.int64)
    changes = torch.zeros(chunks * (chunks + 1), dtype=torch.int64, device=q_documents.device)
    changes.index_add_(0, (line_S + first_BS.clamp(0, end) // k_chunk).flatten(), count_BS.flatten())
    changes.index_add_(0, (line_S + last_BS.clamp(0, end) // k_chunk + 1).flatten(), -count_BS.flatten())
    reached_CC = changes.view(chunks, chunks + 1).cumsum(1)[:, :-1] > 0

    chunk_C = torch.arange(chunks, device=q_documents.device)
    owner_C = torch.minimum(chunk_C, 2 * ring.degree - 1 - chunk_C)
    distance_CC = (owner_C[:, None] - owner_C).remainder(ring.degree)
    hops = torch.zeros(ring.degree, dtype=torch.int64, device=q_documents.device)
    return hops.index_add_(0, distance_CC.flatten(), reached_CC.flatten().to(torch.int64)) > 0


def agreed(hops: Tensor, others: Tensor) -> Tensor:
    """Bool [P] on the host. hops: that some rank found needed; others: that some rank found empty.

    Raises:
        RanksDisagree: a hop is both.
    """
    hops, others = torch.stack([hops, others]).cpu()
    if bool((hops & others).any()):
        found = "the document ids of an attention differ between ranks, which then need other hops of its ring"
        raise RanksDisagree(found, legal="the same inputs on all ranks of cp and tp")
    return hops


def _ring_hops(q_documents: Tensor, k_documents: Tensor, mask: str, degree: int, order: str, inner: int) -> Tensor:
    ring = Ring(q_documents.shape[1], k_documents.shape[1], degree, order, inner)
    return needed_hops(q_documents, k_documents, AttentionMask.parse(mask), ring)


def _fake_ring_hops(q_documents: Tensor, k_documents: Tensor, mask: str, degree: int, *rest: Any) -> Tensor:
    return q_documents.new_empty(degree, dtype=torch.bool)


def _agree_on_hops(hops: Tensor, axis: str) -> Tensor:
    found = torch.cat([hops, ~hops]).to(torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=resolve_process_group(axis))
    return agreed(*found.bool().chunk(2))


def spec_agree_on_hops(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """All ranks' results."""
    every = torch.stack([hops for hops, _ in calls])
    return [agreed(every.any(0), (~every).any(0)) for _ in calls]


_LIBRARY.impl("ring_hops", _ring_hops, "CompositeExplicitAutograd")
torch.library.register_fake("spx::ring_hops", _fake_ring_hops, lib=_LIBRARY)
_LIBRARY.impl("agree_on_hops", _agree_on_hops, "CompositeExplicitAutograd")
torch.library.register_fake(
    "spx::agree_on_hops", lambda hops, axis: hops.new_empty(hops.shape, device="cpu"), lib=_LIBRARY
)
