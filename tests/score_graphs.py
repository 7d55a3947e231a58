"""Pieces of written-out attention: what tests of its recognition share."""

from __future__ import annotations

import torch
from torch import Tensor


def causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def capped(scores: Tensor) -> Tensor:
    return torch.tanh(scores / 5) * 5


def lowest_unless(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))
