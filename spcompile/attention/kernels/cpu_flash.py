"""PyTorch's CPU flash kernel as a provider.

Read from torch 2.13: the kernel takes fewer key heads than query heads without a copy, wants equal head sizes of q, k
and v, a mask of exactly q's dtype (its backward does not check that), and at least one key; its backward accepts the
log-sum-exp and the output of the whole row, not only of the block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from spcompile.attention.kernels.naive import accumulation_dtype
from spcompile.attention.kernels.tiles import Tile, Tiled, tiles
from spcompile.attention.scores.mask import Kind
from spcompile.attention.scores.provider import Block, Gradients, Rows

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _rows_for_kernel(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, its head dim grown to `size` with zeros and dense in memory."""
    x = x.to(dtype)
    if x.shape[-1] < size:
        return pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, additive: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    size = max(q.shape[-1], v.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_rows_for_kernel(x, size, dtype) for x in (q, k, v)), 0.0, causal, attn_mask=additive, scale=scale
    )
    if additive is not None:  # the kernel says 0 for a row without keys
        lse = lse.masked_fill((additive == -torch.inf).all(-1), -torch.inf)
    return out[..., : v.shape[-1]], lse


def _backward(
    rows: Rows, k: Tensor, v: Tensor, scale: float, causal: bool, additive: Tensor | None, dtype: torch.dtype
) -> Gradients:
    # The kernel computes delta = rowsum(out * grad_out) itself. One more column, 1 in out, -grad_lse in grad_out and 0
    # in v, makes it the delta that the gradient of lse asks for and changes nothing else.
    out, grad_out = rows.out, rows.grad_out
    if rows.grad_lse is not None:
        out = torch.cat([out.to(dtype), out.new_ones((*out.shape[:-1], 1), dtype=dtype)], -1)
        grad_out = torch.cat([grad_out.to(dtype), -rows.grad_lse[..., None].to(dtype)], -1)
    size = max(rows.q.shape[-1], out.shape[-1])
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_rows_for_kernel(x, size, dtype) for x in (grad_out, rows.q, k, v, out)),
        rows.lse.masked_fill(rows.lse == -torch.inf, torch.inf),
        0.0,
        causal,
        attn_mask=additive,
        scale=scale,
    )
    return Gradients(dq[..., : rows.q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]])


def _additive(tile: Tile, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias of a tile as one float tensor [B|1, N|1, S, T]."""
    bias = None if tile.bias is None else tile.bias.to(dtype).expand(-1, -1, tile.q.length, -1)
    if tile.keep is None:
        return bias
    if bias is None:
        bias = torch.zeros(tile.keep.shape, dtype=dtype, device=tile.keep.device)
    return torch.where(tile.keep, bias, -torch.inf)


class CpuFlash:
    """`_scaled_dot_product_flash_attention_for_cpu`: FULL and diagonal blocks in one call, others tile by tile."""

    name = "aten"

    def supports(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> bool:
        """CPU tensors of a floating dtype; no softcap, dropout or rounded scores; a bias that q's dtype can hold."""
        scores = block.scores
        if q.device.type != "cpu" or q.dtype not in _DTYPES or scores.softcap or scores.dropout is not None:
            return False
        if (scores.mask.rounded_by, scores.mask.fill) != (None, None):
            return False
        added = [torch.float32] if scores.alibi_slopes is not None else []
        added += [scores.bias.dtype] if scores.bias is not None else []
        return all(torch.promote_types(dtype, q.dtype) == q.dtype for dtype in added)

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Provider`."""
        scale = block.scores.scale
        if block.kind is not Kind.PARTIAL:
            return _forward(q, k, v, scale, block.kind is Kind.CAUSAL_DIAGONAL, None, dtype)
        out = q.new_zeros((*q.shape[:-1], v.shape[3]), dtype=dtype)
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=accumulation_dtype(q.dtype))
        for tile in tiles(block, _masks(block), q.device):
            tile_out, tile_lse = _forward(
                tile.rows(q), tile.keys(k), tile.keys(v), scale, False, _additive(tile, dtype), dtype
            )
            tile.rows(out).copy_(tile_out)
            tile.rows(lse).copy_(tile_lse)
        return out, lse

    def block_backward(
        self, rows: Rows, k: Tensor, v: Tensor, block: Block, dtype: torch.dtype, grad_bias: Tensor | None
    ) -> Gradients:
        """See `Provider`."""
        if grad_bias is not None:  # the kernel does not give the gradient of its mask
            return Tiled().block_backward(rows, k, v, block, dtype, grad_bias)
        scale = block.scores.scale
        accumulate = accumulation_dtype(rows.q.dtype)
        if block.kind is not Kind.PARTIAL:
            work = dtype if rows.grad_lse is None else accumulate
            grads = _backward(rows, k, v, scale, block.kind is Kind.CAUSAL_DIAGONAL, None, work)
            return Gradients(*(grad.to(dtype) for grad in grads))
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (rows.q, k, v))
        for tile in tiles(block, _masks(block), k.device):
            part = _backward(
                rows.narrow(tile.q_offset, tile.q.length),
                tile.keys(k),
                tile.keys(v),
                scale,
                False,
                _additive(tile, accumulate),
                accumulate,
            )
            tile.rows(dq).add_(part.q)
            tile.keys(dk).add_(part.k)
            tile.keys(dv).add_(part.v)
        return Gradients(dq.to(dtype), dk.to(dtype), dv.to(dtype))


def _masks(block: Block) -> int:
    """How many different [S, T] masks the block has."""
    scores = block.scores
    per_batch = [x.shape[0] for x in (scores.q_documents, scores.k_documents, scores.key_valid) if x is not None]
    masks = max(per_batch, default=1)
    if scores.alibi_slopes is not None:
        masks *= scores.alibi_slopes.shape[0]
    return masks if scores.bias is None else max(masks, math.prod(scores.bias.shape[:2]))
