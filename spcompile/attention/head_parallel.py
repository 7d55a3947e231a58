"""Head-parallel attention: an exchange of rows for heads, attention of whole rows, and the exchange back.

Over all ranks of an axis this is Ulysses (Jacobs et al. 2023, arXiv 2309.14509): attention is local. Over neighbours
only, the rows of several neighbours make up one longer part, and what is left is a ring of such parts, for a part of
the heads: the hybrid of Fang and Zhao 2024 (arXiv 2405.07719).

What goes over the wire. One message carries q, k and v. With fewer key heads than ranks some ranks need the same head,
each of them all its rows, so each has to receive them: no exchange sends less, and summing gradients within such a
group first would send as much. Only memory can be saved: k and v are copied once, into the message; they travel in a
message of their own, which the backward sends again, so that what it keeps is the local part. The result is exchanged
again, too: of that, attention's backward needs what it returned, and the next projection's what came back.

B batch, N query heads, G key heads, s local rows, S rows after the exchange, n query heads after it, T all keys,
H head size of q and k, V of v, R ranks that exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import spcompile.collectives  # noqa: F401  (defines the ops)
from spcompile import sequence
from spcompile.attention.heads import HeadSplit
from spcompile.mesh import inner_part, outer_part

spx = torch.ops.spx


def head_parallel_attention(
    q_BNsH: Tensor,
    k_BGsH: Tensor,
    v_BGsV: Tensor,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    key_valid: Tensor | None,
    bias: Tensor | None,
    mask: str,
    scale: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    softcap: float,
    dropout_p: float,
    q_length: Any,
    k_length: Any,
    axis: str,
    degree: int,
    order: str,
    inner: int,
    bias_has_rows: bool,
) -> tuple[Tensor, Tensor]:
    """Attention with heads split over `inner` neighbours and rows over the others; inner = degree is Ulysses.

    Returns [B, N, s, V] and the log-sum-exp [B, N, s], whose exchange is dropped where nobody reads it.

    slopes [N], sinks [N], seeds [B, N] and a bias [B|1, N|1, 1, T] are whole on every rank, which takes those of its
    heads. bias_has_rows: it is [B|1, N, s, T], local rows, which are exchanged like those of q.
    """
    heads = HeadSplit(q_BNsH.shape[1], k_BGsH.shape[1], inner)
    alone = inner == degree
    over = axis if alone else inner_part(axis, inner)
    lengths = (q_length, k_length) if alone else (None, None)
    exchange = _Exchange(over, order)

    whole = exchange.qkv(heads, q_BNsH, k_BGsH, v_BGsV, *lengths)
    if bias is not None and bias_has_rows:
        bias = exchange.bias_rows(heads, bias, lengths[0])
    elif bias is not None:
        bias = exchange.of_heads(heads, bias, 1)
    data = (q_documents, k_documents, key_valid, bias, mask, scale)
    more = (
        exchange.of_heads(heads, alibi_slopes, 0),
        exchange.of_heads(heads, sinks, 0),
        exchange.of_heads(heads, dropout_seed, 1),
        softcap,
        dropout_p,
    )
    if alone:
        out_BnSV, lse_BnS = spx.attention(*whole, None, None, *data, *more)
    else:
        outer = degree // inner
        layout = (q_length, k_length, outer_part(axis, outer), outer, order)
        out_BnSV, lse_BnS = spx.ring_attention(*whole, *data, *layout, *more, inner)
    chunk = None if alone else q_BNsH.shape[2] // sequence.chunks_per_rank(order)
    lse_BNs = exchange.rows(heads, lse_BnS.unsqueeze(3), chunk).squeeze(3)
    return exchange.rows(heads, out_BnSV, chunk), lse_BNs


class _Exchange:
    """All-to-alls among the ranks of `axis`, whose parts of the sequence are in `order`."""

    def __init__(self, axis: str, order: str) -> None:
        self.axis, self.order = axis, order

    def qkv(
        self, heads: HeadSplit, q: Tensor, k: Tensor, v: Tensor, q_length: Any, k_length: Any
    ) -> tuple[Tensor, ...]:
        """[B, N, s, H], [B, G, s, H], [B, G, s, V] -> [B, n, S, H], ... of this rank's heads."""
        q_RBsnH = heads.split_queries(q.transpose(1, 2), 2)
        kv_RBsgX = heads.split_keys(torch.cat([k, v], -1).transpose(1, 2), 2)
        together = not heads.repeats_keys and str(q.shape[2]) == str(k.shape[2])
        if together:
            q_BnSH, kv_BgSX = self.heads((q_RBsnH, kv_RBsgX), q_length)
        else:
            (q_BnSH,) = self.heads((q_RBsnH,), q_length)
            (kv_BgSX,) = self.heads((kv_RBsgX,), k_length, recompute=heads.repeats_keys)
        return q_BnSH, *_pieces(kv_BgSX, [k.shape[3], v.shape[3]])

    def heads(self, parts: Sequence[Tensor], length: Any, recompute: bool = False) -> list[Tensor]:
        """[R, B, s, n, d] of every tensor, rank r's heads at index r -> [B, n, S, d], in one all-to-all.

        length: of the whole sequence, where these ranks hold it; None keeps the padding.
        """
        messages = [x.flatten(3) for x in parts]
        message = messages[0].contiguous() if len(messages) == 1 else torch.cat(messages, -1)
        received_RBsX = spx.all_to_all(message, self.axis, message.shape[0], recompute)
        whole_BSX = sequence.join(received_RBsX, 1, self.order)
        if length is not None:
            whole_BSX = sequence.beginning(whole_BSX, 1, length)
        pieces = _pieces(whole_BSX, [x.shape[-1] for x in messages])
        return [piece.unflatten(-1, x.shape[3:]).transpose(1, 2) for piece, x in zip(pieces, parts, strict=True)]

    def rows(self, heads: HeadSplit, x_BnSV: Tensor, chunk: Any) -> Tensor:
        """[B, n, S, V] -> [B, N, s, V], in memory as [B, s, N, V].

        chunk: elements in one chunk of the order, where S is all of them; None where S is a length without padding.
        """
        x_BSnV, degree = x_BnSV.transpose(1, 2), heads.degree
        if chunk is None:
            parts_RBsnV = sequence.split(x_BSnV, 1, degree, self.order, fill=None)
        else:
            parts_RBsnV = sequence.divide(x_BSnV, 1, degree, self.order, chunk)
        received_RBsnV = spx.all_to_all(parts_RBsnV.contiguous(), self.axis, degree, True)
        return heads.join_queries(received_RBsnV, 2).transpose(1, 2)

    def bias_rows(self, heads: HeadSplit, bias_BNsT: Tensor, length: Any) -> Tensor:
        """[B|1, N, s, T] -> [B|1, n, S, T]; sent again in the backward, since the local rows can be made again."""
        dtype = bias_BNsT.dtype
        sent = bias_BNsT.to(torch.uint8) if dtype is torch.bool else bias_BNsT
        (received,) = self.heads((heads.split_queries(sent.transpose(1, 2), 2),), length, recompute=True)
        return received.to(dtype)

    def of_heads(self, heads: HeadSplit, x: Tensor | None, dim: int) -> Tensor | None:
        """What belongs to this rank's heads of something that has a dim of all heads; padding gets that of head 0."""
        if x is None or x.shape[dim] == 1:
            return x
        every_Rn = heads.split_queries(torch.arange(heads.heads, device=x.device), 0)
        own_n = spx.shard(every_Rn, 0, self.axis, heads.degree, "contiguous", None).squeeze(0)
        return x.index_select(dim, own_n)


def _pieces(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of the last dim, one after the other."""
    if len(sizes) == 1:
        return [x]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(-1, start, size) for start, size in zip(starts, sizes, strict=True)]
