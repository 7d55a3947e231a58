"""`x[arange(B), last]` reads in every row on its own, on whichever axis the rows are split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile

B, S, D = 4, 6, 8


class Reader(nn.Module):
    """One attention, then what `read` finds in it."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.w_DD = nn.Parameter(torch.randn(D, D, dtype=torch.float64))

    def forward(self, x_BSD: Tensor, last_B: Tensor) -> Tensor:
        h_B1SD = (x_BSD @ self.w_DD).unsqueeze(1)
        return self.read(F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1), last_B)


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last": lambda x, last: x[rows(x), last].square().mean(),
    "from the end": lambda x, last: x[rows(x), -1 - last].square().sum(-1),
    "two of each": lambda x, last: x[rows(x)[:, None], torch.stack([last, last * 0], 1)].square().sum((1, 2)),
    "a feature at each position": lambda x, last: x[:, torch.arange(S), torch.arange(S) % D].square().mean(),
}


def verify(read: Callable[[Tensor, Tensor], Tensor], mesh: dict[str, int]) -> spcompile.Report:
    x_BSD = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return spcompile.verify(Reader(read), {"x_BSD": x_BSD, "last_B": torch.tensor([5, 3, 2, 4])}, mesh=mesh)


@pytest.mark.thinned(16)
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"cp": 4}, {"dp": 2, "cp": 2}], ids=str)
@pytest.mark.parametrize("name", READS)
def test_reads_in_each_row(name: str, mesh: dict[str, int]) -> None:
    report = verify(READS[name], mesh)
    assert report.ok, str(report)
    if name == "a feature at each position":
        assert "SPR103" not in {remark.code for remark in report.remarks}  # no positions of other ranks


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", ["last", "from the end"])
def test_reads_in_the_only_row_of_a_rank(name: str) -> None:
    x_BSD = torch.randn(2, S, D, dtype=torch.float64)
    model = Reader(lambda x, last: READS[name](x, last).mean())
    report = spcompile.verify(model, {"x_BSD": x_BSD, "last_B": torch.tensor([5, 3])}, mesh={"dp": 2})
    assert report.ok, str(report)


def test_a_range_over_rows_numbers_those_of_all_ranks() -> None:
    report = verify(lambda x, last: (x * rows(x)[:, None, None]).square().mean(), {"dp": 2})
    assert report.ok, str(report)
