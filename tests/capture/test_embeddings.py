"""Settings of embeddings that change gradients alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile
from spcompile.diagnostics import CaptureFailed


class Looked(nn.Module):
    """Attention over rows of a table."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 8, padding_idx=1, **settings)
        self.last = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.last(F.scaled_dot_product_attention(x, x, x, is_causal=True))


@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("length", [8, 7])
@pytest.mark.thinned(3)
def test_gradients_by_frequency_count_all_tokens(mesh: dict[str, int], length: int) -> None:
    torch.manual_seed(0)
    model = Looked(scale_grad_by_freq=True).double()
    report = spcompile.verify(model, (torch.randint(0, 6, (2, length)),), mesh)
    assert report.ok, report


def test_sparse_gradients_are_refused() -> None:
    with pytest.raises(CaptureFailed, match="sparse gradients") as caught:
        spcompile.explain(Looked(sparse=True), (torch.zeros(2, 8, dtype=torch.long),), {"cp": 2})
    assert "test_embeddings.py" in str(caught.value)
