"""Any block of scores on any device, exactly, as a loop over tiles of rows: memory is bounded, S * T is never built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spcompile.attention.kernels import naive
from spcompile.attention.kernels.naive import accumulation_dtype
from spcompile.attention.scores.provider import Block, Gradients, Rounding, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from spcompile.attention.scores.runs import Run

MAX_ROWS = 256  # small: what a window or a document leaves of a tile's key range grows with its rows
MAX_SCORES = 1 << 23  # elements of one tile's dense scores, all heads together: 32 MiB in float32


@dataclass(frozen=True, eq=False)
class Tile:
    """Some rows of a block and all keys that the mask can reach from them; offsets count inside the block."""

    q: Run
    k: Run
    q_offset: int
    k_offset: int
    keep: Tensor | None
    bias: Tensor | None
    dropout: Tensor | None
    rounding: Rounding | None

    def rows(self, x: Tensor) -> Tensor:
        return x.narrow(2, self.q_offset, self.q.length)

    def keys(self, x: Tensor) -> Tensor:
        return x.narrow(2, self.k_offset, self.k.length)


def tiles(block: Block, heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[Tile]:
    """The tiles of a block.

    heads: how many [S, T] score matrices a kernel holds at a time (batch times heads). dtype: of dropout's factors.
    """
    rows = max(1, min(MAX_ROWS, MAX_SCORES // max(1, heads * block.k.length)))
    for offset in range(0, block.q.length, rows):
        q = block.q.narrow(offset, min(rows, block.q.length - offset))
        k = block.k.between(*block.scores.mask.reach(q.first, q.last))
        if k is None:
            continue
        keep = block.keep(q, k, device)
        if keep is not None and device.type == "cpu":  # elsewhere this would wait for the device
            first, length = _seen(keep)
            if length == 0:
                continue
            k, keep = k.narrow(first, length), keep.narrow(3, first, length)
        dropout = block.dropout(q, k, dtype)
        yield Tile(q, k, offset, k.start - block.k.start, keep, block.bias(q, k), dropout, block.rounding(q))


def _seen(keep: Tensor) -> tuple[int, int]:
    """(first, length) of the keys that any row of a tile sees: with packed documents few of those in reach."""
    columns = keep.flatten(0, 2).any(0).nonzero()
    return (int(columns[0]), int(columns[-1]) + 1 - int(columns[0])) if len(columns) else (0, 0)


def add_grad_bias(grad_bias: Tensor, grad_scores: Tensor, tile: Tile) -> None:
    """Add a tile's gradient of the scores [B, N, S, T] to the whole bias's gradient [B|1, N|1, S|1, Tg] in place."""
    for dim in (0, 1):
        if grad_bias.shape[dim] == 1:
            grad_scores = grad_scores.sum(dim, keepdim=True)
    if grad_bias.shape[2] == 1:
        rows, grad_scores = grad_bias, grad_scores.sum(2, keepdim=True)
    else:
        rows = grad_bias.narrow(2, tile.q.start, tile.q.length)
    if tile.k.gaps is None:
        rows.narrow(3, tile.k.first, tile.k.length).add_(grad_scores)
    else:
        rows.index_add_(3, tile.k.gaps.to(grad_bias.device), grad_scores)


class Tiled:
    """The provider of last resort: dense scores of one tile at a time."""

    name = "tiled"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> bool:
        """Everything."""
        return True

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Provider`."""
        B, N, S, _ = q.shape
        out = q.new_zeros((B, N, S, v.shape[3]), dtype=dtype)
        lse = q.new_full((B, N, S), -torch.inf, dtype=accumulation_dtype(q.dtype))
        scores = block.scores
        for tile in tiles(block, B * N, q.device, lse.dtype):
            tile_out, tile_lse = naive.forward(
                tile.rows(q),
                tile.keys(k),
                tile.keys(v),
                scores.scale,
                tile.keep,
                tile.bias,
                scores.softcap,
                tile.dropout,
                tile.rounding,
            )
            tile.rows(out).copy_(tile_out)
            tile.rows(lse).copy_(tile_lse)
        return out, lse

    def block_backward(
        self, rows: Rows, k: Tensor, v: Tensor, block: Block, dtype: torch.dtype, grad_bias: Tensor | None
    ) -> Gradients:
        """See `Provider`."""
        accumulate = accumulation_dtype(rows.q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (rows.q, k, v))
        scores = block.scores
        for tile in tiles(block, rows.q.shape[0] * rows.q.shape[1], k.device, accumulate):
            part = rows.narrow(tile.q_offset, tile.q.length)
            tile_dq, tile_dk, tile_dv, grad_scores = naive.backward(
                part.q,
                tile.keys(k),
                tile.keys(v),
                part.grad_out,
                part.lse,
                tile.rows(rows.delta),
                scores.scale,
                tile.keep,
                tile.bias,
                scores.softcap,
                tile.dropout,
                tile.rounding,
            )
            tile.rows(dq).add_(tile_dq)
            tile.keys(dk).add_(tile_dk)
            tile.keys(dv).add_(tile_dv)
            if grad_bias is not None:
                add_grad_bias(grad_bias, grad_scores, tile)
        return Gradients(dq.to(dtype), dk.to(dtype), dv.to(dtype))
