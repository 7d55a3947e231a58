"""Head-parallel attention: an all-to-all of rows for heads, attention of whole rows, and the all-to-all back.

Over all ranks of an axis this is Ulysses (Jacobs et al. 2023, arXiv 2309.14509): attention is local. Over neighbours
only, the rows of several neighbours make up one longer part, and what is left is a ring of such parts, for a part of
the heads: the hybrid of Fang and Zhao 2024 (arXiv 2405.07719).

What goes over the wire. One message carries q, k and v, unless several of them hide better (`messages.py`): the bytes
are the same. With fewer key heads than ranks some ranks need the same head, each of them all its rows, so each has to
receive them: no all-to-all sends less, and summing gradients within such a group first would send as much. Only memory
can be saved: k and v are copied once, into the message; they travel in messages without queries, which the backward
sends again, so that what it keeps is the local part. The result is sent again, too: of that, attention's backward
needs what it returned, and the next projection's what came back.

B batch, N query heads, G key heads, s local rows, S rows after the all-to-all, n query heads after it (m of one group
of heads), T all keys, H head size of q and k, V of v, X of anything, R ranks of the all-to-all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import spcompile.collectives  # noqa: F401  (defines the ops)
from spcompile.attention.ring.ring_call import RingCall
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.ulysses.head_groups import HeadGroups
from spcompile.attention.ulysses.head_shares import HeadSplit
from spcompile.attention.ulysses.messages import Message, Messages, together
from spcompile.machine import sequence
from spcompile.machine.mesh import inner_part, outer_part

spx = torch.ops.spx


def head_parallel_attention(
    call: RingCall, inner: int, bias_has_rows: bool, messages: Messages | None = None
) -> tuple[Tensor, Tensor]:
    """The attention of a ring with heads split over `inner` neighbours and rows over the others.

    inner = degree is Ulysses. Returns [B, N, s, V] and the log-sum-exp [B, N, s], whose all-to-all is dropped where
    nobody reads it.

    slopes [N], sinks [N], seeds [B, N] and a bias [B|1, N|1, 1, T] are whole on every rank, which takes those of its
    heads. bias_has_rows: it is [B|1, N, s, T], local rows, which travel like those of q. messages: None is as few as
    possible.
    """
    sizes, outer = call.sizes, call.degree // inner
    heads = HeadSplit(sizes.heads, sizes.kv_heads, inner)
    if messages is None:
        messages = together(heads, keys_apart=keys_travel_apart(heads, call.q_length, call.k_length))
    alone = outer == 1
    lengths = (call.q_length, call.k_length) if alone else (None, None)
    axis = call.axis if alone else inner_part(call.axis, inner)
    all_to_all = _AllToAlls(axis, call.order, HeadGroups(heads, messages.groups))

    qkv = all_to_all.qkv(messages.messages, call.q, call.k, call.v, *lengths)
    rows = call.bias if bias_has_rows else None
    biases = all_to_all.of_heads(call.bias, 1) if rows is None else all_to_all.bias_rows(rows, lengths[0])
    vectors = [all_to_all.of_heads(x, d) for x, d in ((call.alibi_slopes, 0), (call.sinks, 0), (call.dropout_seed, 1))]
    chunk = None if alone else sizes.q_rows // sequence.chunks_per_rank(call.order)
    outs_RBsmV, lses_RBsm1 = [], []
    for q, k, v, bias, slopes, sinks, seed in zip(*qkv, biases, *vectors, strict=True):
        of_group = call.but(q=q, k=k, v=v, bias=bias, alibi_slopes=slopes, sinks=sinks, dropout_seed=seed)
        if alone:
            out_BmSV, lse_BmS = of_group.into(AttentionCall).run()
        else:
            part = outer_part(call.axis, outer)
            out_BmSV, lse_BmS = of_group.but(axis=part, degree=outer, inner=inner).run()
        outs_RBsmV.append(all_to_all.rows(out_BmSV, chunk))
        lses_RBsm1.append(all_to_all.rows(lse_BmS.unsqueeze(3), chunk))
    return all_to_all.joined(outs_RBsmV), all_to_all.joined(lses_RBsm1).squeeze(3)


def keys_travel_apart(heads: HeadSplit, q_length: Any, k_length: Any) -> bool:
    """Whether no message may carry both queries and keys: keys are sent again in the backward, or are more or fewer.

    Lengths of the whole: with padding, ranks may have equally many rows of 17 queries and of 19 keys.
    """
    return heads.repeats_keys or str(q_length) != str(k_length)


class _AllToAlls:
    """All-to-alls among the ranks of `axis`, whose parts of the sequence are in `order`."""

    def __init__(self, axis: str, order: str, groups: HeadGroups) -> None:
        self.axis, self.order, self.groups, self.split = axis, order, groups, groups.split

    def qkv(
        self, messages: Sequence[Message], q: Tensor, k: Tensor, v: Tensor, q_length: Any, k_length: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """[B, N, s, H], [B, G, s, H], [B, G, s, V] -> [B, m, S, H], ... of each group of this rank's heads."""
        values = {"q": q, "k": k, "v": v}
        found: dict[str, dict[int | None, Tensor]] = {name: {} for name in values}
        sent = {name: self._by_rank(name, values) for name in dict.fromkeys(p.name for m in messages for p in m)}
        in_groups = dict.fromkeys(piece.name for m in messages for piece in m if piece.group is not None)
        cut = {name: self._cut(name, sent[name], 3) for name in in_groups}
        for message in messages:
            parts = [sent[name] if group is None else cut[name][group] for name, group in message]
            has_queries = any(piece.name == "q" for piece in message)
            again = self.split.repeats_keys and not has_queries
            received = self.heads(parts, q_length if has_queries else k_length, again)
            for piece, x_BmSX in zip(message, received, strict=True):
                sizes = [values[name].shape[3] for name in piece.name]
                for name, own in zip(piece.name, _pieces(x_BmSX, sizes), strict=True):
                    found[name][piece.group] = own
        q_parts, k_parts, v_parts = (self._by_group(name, own) for name, own in found.items())
        return q_parts, k_parts, v_parts

    def _by_rank(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """q, k or v, or k and v side by side, [B, N, s, X] -> [R, B, s, n, X]."""
        x_BsNX = (values[name] if len(name) == 1 else torch.cat([values[x] for x in name], -1)).transpose(1, 2)
        return self.split.split_queries(x_BsNX, 2) if name == "q" else self.split.split_keys(x_BsNX, 2)

    def _cut(self, name: str, x: Tensor, dim: int) -> list[Tensor]:
        """What each group has of this rank's heads at `dim`."""
        return self.groups.queries(x, dim) if name == "q" else self.groups.keys(x, dim)

    def _by_group(self, name: str, received: dict[int | None, Tensor]) -> list[Tensor]:
        if None in received:
            return self._cut(name, received[None], 1)
        return [received[group] for group in range(self.groups.count)]

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

    def rows(self, x_BmSX: Tensor, chunk: Any) -> Tensor:
        """The heads of one group, [B, m, S, X] -> [R, B, s, m, X], those of rank r at index r.

        chunk: elements in one chunk of the order, where S is all of them; None where S is a length without padding.
        """
        x_BSmX, degree = x_BmSX.transpose(1, 2), self.split.degree
        if chunk is None:
            parts_RBsmX = sequence.split(x_BSmX, 1, degree, self.order, fill=None)
        else:
            parts_RBsmX = sequence.divide(x_BSmX, 1, degree, self.order, chunk)
        return spx.all_to_all(parts_RBsmX.contiguous(), self.axis, degree, True)

    def joined(self, parts_RBsmX: list[Tensor]) -> Tensor:
        """What came back of all groups -> [B, N, s, X], in memory as [B, s, N, X]."""
        received_RBsnX = self.groups.join_queries(parts_RBsmX, 3)
        return self.split.join_queries(received_RBsnX, 2).transpose(1, 2)

    def bias_rows(self, bias_BNsT: Tensor, length: Any) -> list[Tensor]:
        """[B|1, N, s, T] -> of each group [B|1, m, S, T]; sent again in the backward, as it can be made again."""
        dtype = bias_BNsT.dtype
        sent = bias_BNsT.to(torch.uint8) if dtype is torch.bool else bias_BNsT
        (received,) = self.heads((self.split.split_queries(sent.transpose(1, 2), 2),), length, recompute=True)
        return self.groups.queries(received.to(dtype), 1)

    def of_heads(self, x: Tensor | None, dim: int) -> Sequence[Tensor | None]:
        """What belongs to each group of this rank's heads of something that has a dim of all heads.

        Padding gets that of head 0.
        """
        if x is None or x.shape[dim] == 1:
            return [x] * self.groups.count
        every_Rn = self.split.split_queries(torch.arange(self.split.heads, device=x.device), 0)
        own_n = spx.shard(every_Rn, 0, self.axis, self.split.degree, "contiguous", None).squeeze(0)
        return [x.index_select(dim, own_m) for own_m in self.groups.queries(own_n, 0)]


def _pieces(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of the last dim, one after the other, whose gradients are put together at once."""
    return [x] if len(sizes) == 1 else list(x.split(list(sizes), -1))
