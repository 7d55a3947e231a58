"""Attentions in plain torch, with a mask, scores or dropout of every kind, and data for them in float64.

q [B, N, S, H], k and v [B, G, T, H]: N query heads, G key heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[..., Tensor]


def heads(count: int, length: int, width: int = 2, batch: int = 2) -> Tensor:
    return (0.5 * torch.randn(batch, count, length, width, dtype=torch.float64)).requires_grad_()


def qkv(n: int, g: int, length: int, k_length: int | None = None) -> list[Tensor]:
    """Values are wider than keys."""
    k_length = length if k_length is None else k_length
    return [heads(n, length), heads(g, k_length), heads(g, k_length, 3)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 3), enable_gqa=True)


def packed(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    same = documents[:, None, :, None] == documents[:, None, None, :]
    at = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same & (at[:, None] >= at), enable_gqa=True)


def padded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :], enable_gqa=True)


def capped_with_sinks(q: Tensor, k: Tensor, v: Tensor, by_head: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.tanh(q @ k.mT / 2) * 2
    scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    joined = torch.cat([scores, by_head.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return joined.softmax(-1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, by_head: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1.0, q.shape[1] + 1, dtype=q.dtype)
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v * by_head.sum()))
    scores = q @ k.mT + slopes[:, None, None] * distance
    return scores.masked_fill(distance > 0, -torch.inf).softmax(-1) @ v


def one_row_bias(q: Tensor, k: Tensor, v: Tensor, by_head: Tensor) -> Tensor:
    bias = by_head[:, None, None] * torch.arange(k.shape[2], dtype=q.dtype).sin()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], enable_gqa=True)


def dense_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.4, enable_gqa=True)
    return F.dropout(y, 0.5)


DATA: dict[str, tuple[Attention, Callable[[int, int], list[Tensor]]]] = {
    "full": (full, lambda n, s: []),
    "causal": (causal, lambda n, s: []),
    "window": (windowed, lambda n, s: []),
    "documents": (packed, lambda n, s: [torch.arange(s).div(3, rounding_mode="floor").expand(2, s).contiguous()]),
    "key padding": (padded, lambda n, s: [torch.arange(s).expand(2, s) < torch.tensor([[s], [max(1, s - 4)]])]),
    "softcap and sinks": (capped_with_sinks, lambda n, s: [torch.randn(n, dtype=torch.float64, requires_grad=True)]),
    "alibi": (alibi, lambda n, s: [torch.randn(n, dtype=torch.float64, requires_grad=True)]),
    "bias of one row": (one_row_bias, lambda n, s: [torch.randn(n, dtype=torch.float64, requires_grad=True)]),
    "bias": (dense_bias, lambda n, s: [torch.randn(1, n, s, s, dtype=torch.float64, requires_grad=True)]),
    "dense mask": (dense_bias, lambda n, s: [(torch.rand(2, n, s, s) > 0.3) | torch.eye(s, dtype=torch.bool)]),
}
