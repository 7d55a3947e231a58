"""Modules that are moved inside of a forward, and tensors made by the class: Dynamo's writing of both means little."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile
from spcompile.capture.module_moves import set_to_itself
from spcompile.diagnostics import CaptureFailed


class Moved(nn.Module):
    """B batch, S sequence, D width."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()

    def forward(self, x_BSD: Tensor) -> Tensor:
        self.inner.to(x_BSD.device)
        h_BSD = self.inner(x_BSD)
        share = torch.Tensor([3]).to(h_BSD).log()
        return nn.functional.scaled_dot_product_attention(h_BSD, h_BSD, h_BSD) * share


def test_a_module_that_is_there_already_stays() -> None:
    report = spcompile.verify(Moved(), (torch.randn(2, 8, 4, dtype=torch.float64),), {"cp": 2})
    assert report.ok, str(report)


@pytest.mark.parametrize("to", [torch.float64, torch.float32])
def test_what_is_set_to_something_else_is_refused(to: torch.dtype) -> None:
    graph = fx.Graph()
    kept = graph.placeholder("kept")
    new = graph.call_method("to", (kept, "cpu", to))
    node = graph.call_function(torch.Tensor.set_, (kept, new))
    kept.meta["example_value"] = torch.zeros(2, dtype=torch.float64)
    new.meta["example_value"] = torch.zeros(2, dtype=to)
    if to is torch.float64:
        assert set_to_itself(node) is kept
        return
    with pytest.raises(CaptureFailed, match="the storage of a tensor is replaced"):
        set_to_itself(node)
