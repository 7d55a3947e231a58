"""A model around a few lines that a test is about.

B batch, S sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8
Lines = Callable[[nn.Linear, Tensor], Tensor]


class AroundAttention(nn.Module):
    """Runs `lines(inner, x_BSD)` on what an attention gives, between two products."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.lines = lines

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.first(x_BSD)
        y_BSD = self.lines(self.inner, F.scaled_dot_product_attention(x_BSD, x_BSD, x_BSD, is_causal=True))
        return self.last(y_BSD.sin()) + x_BSD
