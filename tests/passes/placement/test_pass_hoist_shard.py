"""hoist-shard: a shard that two ops need moves once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile


class TwoReaders(nn.Module):
    """Positions that a rank looks up enter before attention and behind it, each through another op."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Embedding(9, 4, dtype=torch.float64)
        self.up, self.down = (nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        places_SD = self.places(torch.arange(x_BSD.shape[1])).exp()
        h_B1SD = x_BSD.unsqueeze(1)
        y_BSD = F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).squeeze(1)
        y_BSD = y_BSD + self.down(F.gelu(self.up(y_BSD))) + places_SD.tanh()
        y_BSD = y_BSD + self.down(F.gelu(self.up(y_BSD))) + places_SD.sin()
        return y_BSD.square().sum()


def test_a_value_that_two_sharded_ops_read() -> None:
    x_BSD = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    report = spcompile.verify(TwoReaders(), {"x_BSD": x_BSD}, mesh={"tp": 2})
    assert report.ok, str(report)
