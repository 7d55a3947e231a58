"""Masks in graphs: what tests of their recognition share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH = 12
LENGTHS = torch.tensor([12, 7])
VALID = torch.arange(LENGTH)[None] < LENGTHS[:, None]
LEFT = VALID.flip(1)
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 1, 2, 3, 9, 10, 11, 2, 3]])
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [1] * 6 + [3] * 4])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def indices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]


def lowest_unless(mask: Tensor) -> Tensor:
    lowest = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    return torch.where(mask, torch.zeros((), dtype=torch.float64), lowest)


def packed(positions: Tensor, starts: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    documents = starts(positions).cumsum(-1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return positions[:, None, :, None], positions[:, None, None, :], same


STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "diff, prepended": lambda p: torch.diff(p, prepend=p[:, :1] - 1) != 1,
    "diff, negated": lambda p: ~(torch.diff(p, prepend=p[:, :1] - 1) == 1),
    "diff as int": lambda p: (torch.diff(p, prepend=p[:, :1] - 1) != 1).long(),
    "shifted by cat": lambda p: p != torch.cat([p[:, :1] - 1, p[:, :-1]], 1) + 1,
    "or": lambda p: (torch.diff(p, prepend=p[:, :1] - 1) != 1) | (p == 0),
}
