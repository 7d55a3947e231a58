"""cancel-collectives: what two changes of state amount to may be there already, for a reader that comes later.

B batch, S sequence, D width, P pairs of positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile


class Pairs(nn.Module):
    """An attention, and products of pairs of its rows, which are weights of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.q, self.k, self.v, self.out, self.last = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.first(x_BSD)
        q, k, v = (layer(x_BSD).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x_BSD = x_BSD + self.out(attended)
        length = x_BSD.shape[1]
        rows_P, columns_P = torch.tril_indices(length, length)
        products_BP = (x_BSD[:, rows_P] * x_BSD[:, columns_P]).sum(-1)
        entries = (torch.arange(len(x_BSD))[:, None], rows_P[None], columns_P[None])
        weights_BSS = x_BSD.new_zeros(len(x_BSD), length, length).index_put(entries, products_BP)
        return x_BSD + weights_BSS @ self.last(x_BSD)


def test_one_that_is_there_already_comes_before_its_new_readers() -> None:
    torch.manual_seed(0)
    report = spcompile.verify(Pairs().double(), (torch.randn(2, 12, 8, dtype=torch.float64),), {"tp": 2})
    assert report.ok, report
