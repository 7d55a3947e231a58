"""Which hops of a ring documents leave anything to do. Documents are data, so this is asked once a step and mask.

`spx::ring_hops` reads the document ids, which every rank holds whole, and answers for all ranks together: so all ranks
find the same. It knows nothing of the rank. Its result is on the host; where the ids are on a GPU, it waits for them.

B batch, S query rows, T keys of the whole sequence, P ranks of the ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spcompile.attention.mask import AttentionMask
from spcompile.attention.ring import Ring
from spcompile.sequence import chunk_length, chunks_per_rank

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_LIBRARY.define(
    "ring_hops(Tensor q_documents, Tensor k_documents, str mask, int degree, str order, int inner) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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


def _ring_hops(q_documents: Tensor, k_documents: Tensor, mask: str, degree: int, order: str, inner: int) -> Tensor:
    ring = Ring(q_documents.shape[1], k_documents.shape[1], degree, order, inner)
    return needed_hops(q_documents, k_documents, AttentionMask.parse(mask), ring).cpu()


def _fake(q_documents: Tensor, k_documents: Tensor, mask: str, degree: int, *rest: Any) -> Tensor:
    return torch.empty(degree, dtype=torch.bool, device="cpu")


_LIBRARY.impl("ring_hops", _ring_hops, "CompositeExplicitAutograd")
torch.library.register_fake("spx::ring_hops", _fake, lib=_LIBRARY)
