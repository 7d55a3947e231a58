"""Which tiles of scores a kernel computes: of each row of tiles the segments that the mask fills and that it cuts.

A tile is block_m query rows by block_n keys. The least and the greatest position and document of its rows and of its
keys decide: EMPTY tiles are skipped, FULL ones need no mask, all others are PARTIAL. That is exact under any order of
rows and keys; only how many tiles are PARTIAL depends on the order.

B batch (1 where all have the same places), S query rows, T keys, R at most so many segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor

    from spcompile.attention.scores.mask import AttentionMask


class Places(NamedTuple):
    """Where rows or keys stand: positions int32 [B|1, S], -1 where nothing may be seen; documents [B|1, S] or None."""

    positions: Tensor
    documents: Tensor | None


class Segments(NamedTuple):
    """For each tile row: [start, stop) of tiles, int32 [B, rows, R, 2], and how many of them count, int32 [B, rows]."""

    full: Tensor
    full_count: Tensor
    partial: Tensor
    partial_count: Tensor


class _Range(NamedTuple):
    """The extremes of each tile, [B|1, tiles]; where a tile is `bare` there are none."""

    low: Tensor
    high: Tensor
    bare: Tensor
    whole: Tensor
    low_document: Tensor | None
    high_document: Tensor | None


def _ranges(places: Places, block: int) -> _Range:
    positions, documents = places
    tiles = -(-positions.shape[1] // block)
    missing = tiles * block - positions.shape[1]
    positions = pad(positions, (0, missing), value=-1).unflatten(1, (tiles, block))
    seen = positions >= 0
    low = positions.masked_fill(~seen, torch.iinfo(torch.int32).max).amin(-1)
    low_document = high_document = None
    if documents is not None:
        # A copy of the last id at the end changes no extreme.
        end = documents[:, -1:].expand(-1, missing)
        documents = torch.cat([documents, end], 1).unflatten(1, (tiles, block))
        low_document, high_document = documents.amin(-1), documents.amax(-1)
    return _Range(low, positions.amax(-1), ~seen.any(-1), seen.all(-1), low_document, high_document)


def tile_kinds(mask: AttentionMask, q: Places, k: Places, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """(full, partial): bool [B, tiles of rows, tiles of keys]; what is neither is empty."""
    rows, keys = _ranges(q, block_m), _ranges(k, block_n)
    q_low, q_high, k_low, k_high = rows.low[:, :, None], rows.high[:, :, None], keys.low[:, None], keys.high[:, None]
    empty = rows.bare[:, :, None] | keys.bare[:, None]
    full = rows.whole[:, :, None] & keys.whole[:, None]
    if mask.causal:
        hidden, seen = k_low > q_high + mask.offset, k_high <= q_low + mask.offset
        if mask.prefix is not None:
            hidden, seen = hidden & (k_low >= mask.prefix), seen | (k_high < mask.prefix)
        empty, full = empty | hidden, full & seen
    if mask.window is not None:
        empty, full = empty | (q_low - k_high >= mask.window), full & (q_high - k_low < mask.window)
    if mask.window_right is not None:
        empty, full = empty | (k_low - q_high >= mask.window_right), full & (k_high - q_low < mask.window_right)
    if mask.chunk is not None:
        first, last = q_low // mask.chunk, q_high // mask.chunk
        k_first, k_last = k_low // mask.chunk, k_high // mask.chunk
        empty = empty | (last < k_first) | (first > k_last)
        full = full & (first == last) & (k_first == k_last) & (first == k_first)
    if rows.low_document is not None and rows.high_document is not None:
        assert keys.low_document is not None
        assert keys.high_document is not None
        first, last = rows.low_document[:, :, None], rows.high_document[:, :, None]
        k_first, k_last = keys.low_document[:, None], keys.high_document[:, None]
        empty = empty | (last < k_first) | (first > k_last)
        full = full & (first == last) & (k_first == k_last) & (first == k_first)
    return full & ~empty, ~full & ~empty


def segments(full: Tensor, partial: Tensor) -> Segments:
    """The maximal segments of chosen tiles in each row of `tile_kinds`."""
    return Segments(*_segments(full), *_segments(partial))


def _segments(chosen: Tensor) -> tuple[Tensor, Tensor]:
    tiles = chosen.shape[-1]
    most = (tiles + 1) // 2
    index = torch.arange(tiles, dtype=torch.int32, device=chosen.device)
    starts = chosen & ~pad(chosen, (1, 0))[..., :-1]
    stops = chosen & ~pad(chosen, (0, 1))[..., 1:]
    bounds = [torch.where(starts, index, tiles), torch.where(stops, index + 1, tiles + 1)]
    table = torch.stack([x.sort(-1).values[..., :most] for x in bounds], -1)
    return table.to(torch.int32).contiguous(), starts.sum(-1, dtype=torch.int32)
