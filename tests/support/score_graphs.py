"""Pieces of written-out attention: what tests of its recognition share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 24  # features of `Layers`


def causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def capped(scores: Tensor) -> Tensor:
    return torch.tanh(scores / 5) * 5


def lowest_unless(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))


class Layers(nn.Module):
    """Two layers over [B, S, WIDTH] and a loss of all rows, those without keys among them.

    attention: of q, k, v [B, heads, S, WIDTH / heads] and what was given. size: of the weights.
    """

    def __init__(self, attention: Callable[..., Tensor], heads: int, size: float = 0.3) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        torch.manual_seed(0)
        self.w_L4DD = nn.Parameter(size * torch.randn(2, 4, WIDTH, WIDTH, dtype=torch.float64))

    def forward(self, x_BSD: Tensor, given: Tensor) -> Tensor:
        for w_4DD in self.w_L4DD:
            q, k, v = ((x_BSD @ w_DD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w_DD in w_4DD[:3])
            out_BSD = self.attention(q, k, v, given).transpose(1, 2).flatten(2)
            x_BSD = x_BSD + out_BSD @ w_4DD[3]
        return x_BSD.square().mean()
