"""Attention on one rank: its own query rows over gathered keys and values, or all queries over its own keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.runs import PADDING
from spcompile.graph.reshard import Place
from spcompile.graph.sizes import Size, same
from spcompile.sharding.layout import layout_of
from spcompile.sharding.propagate import Choice
from spcompile.sharding.spaces import Space, leaves
from spcompile.sharding.split_dims import SplitDims

spx = torch.ops.spx


def attention(split: SplitDims, n: fx.Node, args: tuple[Any, ...]) -> Any:
    """Query rows local, keys and values gathered: right as it stands; `parallelize-attention` improves it.

    The rows of an image are laid out as their product is, which rings and Ulysses can read. Where they do not divide
    the product has padding within, which keys say.
    """
    whole, call = AttentionCall.of(n), AttentionCall.bind(*args)
    assert call.q_positions is call.k_positions is None, "positions before lowering"
    q_rows, k_dims = _dims_of(whole.q)[2], _dims_of(whole.k)
    may_pad = call.q_documents is call.k_documents is None and not call.has_dropout
    if k_dims[2]:  # a single key is whole on every rank
        length = _length_of_product(split, k_dims[2], may_pad)
        k, v = (_all_rows(split, x, k_dims, length) for x in (call.k, call.v))
        call = call.but(k=k, v=v)
        missing = 0 if length is None else length - whole.sizes.k_rows
        call = call if isinstance(missing, int) and missing == 0 else _with_padding(call, missing)
    length = _length_of_product(split, q_rows, may_pad)
    if length is None:
        positions = _positions(split, q_rows, call.q.device)
    else:
        positions = spx.positions(length, split.axis, split.degree, split.order, device=call.q.device)
    out, lse = call.but(q_positions=positions).run()
    if split.padded(q_rows[0]):
        out = split.on_split_dim(out, _dims_of(n), Place(2), True, split.mask_benignly)
    return out, lse


def _length_of_product(split: SplitDims, rows: list[Space], may_pad: bool) -> Size | None:
    """How long rows of several spaces are, with padding, that lie on ranks as if their product were split.

    None for the rows of one space, and for those that have padding which may not be, or of which nobody knows how much.
    """
    length, unit = split.length_and_unit(rows)
    if len(rows) == 1 or not split.padded(rows[0]):
        return length * unit if len(rows) > 1 else None
    known = all(isinstance(size, int) for size in (length, unit)) and same(length, split.whole(rows[0]))
    return split.local(rows[0]) * split.degree * unit if known and may_pad else None


def _all_rows(split: SplitDims, x: Tensor, dims: list[list[Space]], length: Size | None) -> Tensor:
    """S -> R of keys or values [B, G, T, H], whose product of rows has `length`, if any."""
    if length is not None:
        return spx.all_gather(x, 2, length, split.axis, split.degree, split.order, "R")
    return split.on_split_dim(x, dims, Place(2), True, lambda x, dim, space: split.gather(x, dim, space, "R"))


def _with_padding(call: AttentionCall, missing: int) -> AttentionCall:
    """An attention whose last `missing` keys are padding."""
    mask, length = call.attention_mask, call.k.shape[2]
    valid = torch.arange(length, device=call.k.device)[None] < length - missing
    if call.key_valid is not None:
        valid = valid & F.pad(call.key_valid, (0, missing))
    bias = call.bias
    if bias is not None and not same(bias.shape[-1], 1):
        bias = F.pad(bias, (0, missing))
    return call.but(key_valid=valid, bias=bias, mask=str(replace(mask, key_padding=True)))


def merged_attention(split: SplitDims, n: fx.Node, choice: Choice, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """All queries over this rank's keys, merged over ranks: out is the mean of theirs, weighted by exp(lse)."""
    call = AttentionCall.bind(*args)
    keys = _dims_of(AttentionCall.of(n).k)[2]
    assert choice.part == 0, "positions of a dim of which an inner factor is split"
    positions = _positions(split, keys, call.k.device)
    if split.padded(keys[0]):
        length = math.prod(space.find().size for space in keys)
        positions = positions.masked_fill(positions >= length, PADDING)
    out, lse = call.but(k_positions=positions).run()
    # A rank of which a query sees no key has weight 0; where it sees none at all, any weights do: all out are 0.
    least = torch.finfo(lse.dtype).min

    def total(state: str) -> Tensor:
        lses = spx.all_gather(lse.unsqueeze(0), 0, split.degree, split.axis, split.degree, "contiguous", state)
        return lses.clamp(min=least).logsumexp(0)

    weight = (lse.clamp(min=least) - total("R")).exp()
    merged = spx.all_reduce(out.to(lse.dtype) * weight.unsqueeze(-1), split.axis, split.degree, "I")
    whole = total("I")  # read by few: else it is dead
    return merged.to(out.dtype), whole.masked_fill(whole == least, -torch.inf)


def _positions(split: SplitDims, rows: list[Space], device: torch.device) -> Tensor:
    """Position in the whole dim of every local index, where the first of its factors is split: int32 [local]."""
    outer, *inner = rows
    positions = spx.positions(split.capacity(outer), split.axis, split.degree, split.order, device=device)
    for space in inner:
        size = space.find().size
        within = torch.arange(size, dtype=torch.int32, device=device)
        positions = (positions[:, None] * size + within).flatten()
    return positions


def _dims_of(value: fx.Node) -> list[list[Space]]:
    """The finest factors of every dim of a value."""
    layout = layout_of(value)
    assert layout is not None
    return [leaves(dim) for dim in layout.dims[0]]
