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

from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask

if TYPE_CHECKING:
    from torch import Tensor


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


_WITHIN_INT32 = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32)


def document_numbers(q_documents: Tensor, k_documents: Tensor) -> tuple[Tensor, Tensor]:
    """int32 numbers that are equal, or greater, where the ids are: those that int32 does not hold are counted."""
    if all(x.dtype in _WITHIN_INT32 for x in (q_documents, k_documents)):
        return q_documents.to(torch.int32), k_documents.to(torch.int32)
    ordered, order = torch.cat([q_documents.flatten(), k_documents.flatten()]).sort()
    begins = torch.cat([ordered.new_zeros(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    ranks = begins.cumsum(0, dtype=torch.int32)  # no size depends on the ids: nothing waits for the GPU
    numbers = torch.empty_like(ranks).scatter_(0, order, ranks)
    q_numbers, k_numbers = numbers.split([q_documents.numel(), k_documents.numel()])
    return q_numbers.view(q_documents.shape), k_numbers.view(k_documents.shape)


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
    empty = bare = rows.bare[:, :, None] | keys.bare[:, None]
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
        if mask.fill is not None:
            empty = (empty & (first > WITHOUT_KEYS)) | bare
    return full & ~empty, ~full & ~empty


def segments(full: Tensor, partial: Tensor, most: int | None = None) -> Segments:
    """The maximal segments of chosen tiles in each row of `tile_kinds`.

    most: R; by default what no row has more of. A row that has more is cut short by `cut_short`.
    """
    most = (full.shape[-1] + 1) // 2 if most is None else most
    return Segments(*_segments(full, most), *_segments(partial, most))


def cut_short(full: Tensor, partial: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same tiles in at most so many segments a row: what is behind becomes one segment of PARTIAL tiles.

    It is exact, since a kernel asks the mask about every score of a PARTIAL tile; full and empty tiles in it only take
    longer.
    """
    kind = full.to(torch.int8) + 2 * partial.to(torch.int8)
    begins = (kind != 0) & (kind != pad(kind, (1, 0))[..., :-1])
    number = begins.cumsum(-1, dtype=torch.int32)
    last = (kind != 0).flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) > 0  # up to the last tile that is not empty
    behind = (number[..., -1:] > most) & (number >= most)
    return full & ~behind, (partial & ~behind) | (behind & last)


def _segments(chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
    tiles = chosen.shape[-1]
    index = torch.arange(tiles, dtype=torch.int32, device=chosen.device)
    starts = chosen & ~pad(chosen, (1, 0))[..., :-1]
    stops = chosen & ~pad(chosen, (0, 1))[..., 1:]
    bounds = [torch.where(starts, index, tiles), torch.where(stops, index + 1, tiles + 1)]
    table = pad(torch.stack([_least(x, most) for x in bounds], -1), (0, 0, 0, max(0, most - tiles)))
    return table.to(torch.int32).contiguous(), starts.sum(-1, dtype=torch.int32)


def _least(x: Tensor, count: int) -> Tensor:
    """The least numbers of each row in ascending order, at most so many."""
    if 2 * count >= x.shape[-1]:
        return x.sort(-1).values[..., :count]
    return x.topk(count, largest=False, sorted=True).values
