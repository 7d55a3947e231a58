"""Attention on dense scores: the reference every kernel is tested against, and the exact path for small tiles.

B batch, N query heads, G key heads (N a multiple of G), S query rows, T keys, H head size of q and k, V of v.
All arithmetic is float32, or float64 for float64 inputs. The formulas of the block-wise form (log-sum-exp of the rows
out of the forward, the global one into the backward) are those of FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from spcompile.attention.scores.provider import Rounding


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over keys, and log-sum-exps, are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _masked_scores(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    rounding: Rounding | None,
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, N, S, T] and, with a softcap, its derivative there.

    k is never repeated: the query heads that share a key head are folded into its rows.
    """
    B, N, S, H = q.shape
    G, T = k.shape[1], k.shape[2]
    scores = ((q.reshape(B, G, N // G * S, H) * scale) @ k.mT).view(B, N, S, T)
    slope = None
    if softcap:
        tanh = (scores / softcap).tanh()
        scores, slope = softcap * tanh, 1 - tanh.square()
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if rounding is not None:
        number = max(rounding.number, torch.finfo(scores.dtype).min)
        rounded = (scores + number) - number
        scores = rounded if rounding.rows is None else torch.where(rounding.rows, rounded, scores)
    return scores if keep is None else scores.masked_fill(~keep, -torch.inf), slope


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    dropout: Tensor | None = None,
    rounding: Rounding | None = None,
) -> tuple[Tensor, Tensor]:
    """(softmax(cap(scale * q k^T) + bias) * dropout) v over one block of keys, and the log-sum-exp of its scores.

    q [B, N, S, H], k [B, G, T, H], v [B, G, T, V]; keep bool, bias and dropout float, all three broadcastable to
    [B, N, S, T]; cap(x) = softcap * tanh(x / softcap), the identity for 0. rounding: see `AttentionMask`.
    Returns out [B, N, S, V] and lse [B, N, S] in the accumulation dtype; rows without a key give 0 and -inf.
    """
    B, N, S, _ = q.shape
    G, T, V = v.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    scores, _ = _masked_scores(q.to(dtype), k.to(dtype), keep, bias, scale, softcap, rounding)
    lse = scores.logsumexp(-1)
    weights = (scores - _finite(lse)[..., None]).exp()
    if dropout is not None:
        weights = weights * dropout
    out = weights.view(B, G, N // G * S, T) @ v.to(dtype)
    return out.view(B, N, S, V), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    dropout: Tensor | None = None,
    rounding: Rounding | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one block of keys adds to the gradients, in the accumulation dtype.

    lse [B, N, S] is over all keys, not only this block's; delta [B, N, S] = rowsum(out * grad_out) of the final out.
    Returns dq [B, N, S, H], dk [B, G, T, H], dv [B, G, T, V] and the gradient of the biased scores [B, N, S, T].
    """
    B, N, S, H = q.shape
    G, T, V = v.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))
    scores, slope = _masked_scores(q, k, keep, bias, scale, softcap, rounding)
    probabilities = (scores - _finite(lse)[..., None]).exp()
    grad_rows = grad_out.reshape(B, G, N // G * S, V)
    grad_probabilities = (grad_rows @ v.mT).view(B, N, S, T)
    weights = probabilities
    if dropout is not None:
        weights, grad_probabilities = probabilities * dropout, grad_probabilities * dropout
    dv = weights.view(B, G, N // G * S, T).mT @ grad_rows
    grad_scores = probabilities * (grad_probabilities - delta[..., None])
    grad_products = grad_scores if slope is None else grad_scores * slope
    grad_rows_scores = grad_products.view(B, G, N // G * S, T)
    dq = (grad_rows_scores @ k).view(B, N, S, H) * scale
    dk = grad_rows_scores.mT @ q.reshape(B, G, N // G * S, H) * scale
    return dq, dk, dv, grad_scores


def _finite(lse: Tensor) -> Tensor:
    """-inf (a row without keys) becomes +inf, so that exp(score - lse) is 0 and never NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
