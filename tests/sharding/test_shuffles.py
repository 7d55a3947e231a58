"""Rows sorted by experts: each rank sorts its own where nobody sees the order, and all ranks' rows where somebody does.

B batch, S sequence, D width, E experts, N tokens, K experts of a token, R = N * K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile

B, S, D, E, K = 2, 10, 6, 4, 2
Body = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x_ND, expert_NK, weight_NK, w_EDD -> y_ND
GATHERS = {"SPR102", "SPR103", "SPR107"}


class Mixture(nn.Module):
    """Attention, then experts as `body` applies them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.qkv = nn.Linear(D, 3 * D, dtype=torch.float64)
        self.gate = nn.Linear(D, E, dtype=torch.float64)
        self.w_EDD = nn.Parameter(torch.randn(E, D, D, dtype=torch.float64))

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x_BSD).chunk(3, -1))
        x_BSD = x_BSD + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x_ND = x_BSD.reshape(-1, D)
        weight_NK, expert_NK = self.gate(x_ND).softmax(-1).topk(K)
        y_BSD = self.body(x_ND, expert_NK, weight_NK, self.w_EDD).reshape(x_BSD.shape)
        return (x_BSD + y_BSD).square().mean()


def apply(x_RD: Tensor, expert_R: Tensor, w_EDD: Tensor) -> Tensor:
    return F.gelu(torch.bmm(x_RD.unsqueeze(1), w_EDD[expert_R]).squeeze(1))


def inverse_by_writing(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * weight_NK.reshape(-1)[row_R].unsqueeze(-1)
    inverse_R = torch.empty_like(row_R)
    inverse_R[row_R] = torch.arange(row_R.shape[0])
    return y_RD[inverse_R].view(-1, K, D).sum(1)


def inverse_by_sorting(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.flatten().argsort(stable=True)
    token_R = row_R.div(K, rounding_mode="floor")
    y_RD = apply(x_ND.index_select(0, token_R), expert_NK[token_R, row_R % K], w_EDD)
    return (y_RD[row_R.argsort()].view(-1, K, D) * weight_NK.unsqueeze(-1)).sum(1)


def rows_written_back(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = torch.sort(expert_NK.reshape(-1), descending=True)
    y_RD = torch.zeros(expert_R.shape[0], D, dtype=x_ND.dtype)
    y_RD[row_R] = apply(x_ND[row_R // K], expert_R, w_EDD)
    return torch.einsum("nkd,nk->nd", y_RD.view(-1, K, D), weight_NK)


def added_to_tokens(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.reshape(-1).argsort()
    token_R, choice_R = row_R // K, row_R % K
    y_RD = apply(x_ND[token_R], expert_NK[token_R, choice_R], w_EDD) * weight_NK[token_R, choice_R, None]
    return x_ND.index_add(0, token_R, y_RD)


def scattered_to_tokens(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    token_RD = (row_R // K).unsqueeze(-1).expand(-1, D)
    y_RD = apply(x_ND.gather(0, token_RD), expert_R, w_EDD) * weight_NK.view(-1)[row_R, None]
    return torch.zeros_like(x_ND).scatter_add(0, token_RD, y_RD)


def tokens_of_each_choice(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """Rows are [K, N], so that the token is a remainder, by a number that ranks have only a part of."""
    expert_R, row_R = expert_NK.t().reshape(-1).sort()
    token_R, choice_R = row_R % x_ND.shape[0], row_R // x_ND.shape[0]
    y_RD = apply(x_ND[token_R], expert_R, w_EDD) * weight_NK[token_R, choice_R, None]
    return torch.zeros_like(x_ND).index_add(0, token_R, y_RD)


def accumulated(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * weight_NK.view(-1)[row_R, None]
    return torch.zeros_like(x_ND).index_put((row_R // K,), y_RD, accumulate=True)


UNSEEN = [
    inverse_by_writing,
    inverse_by_sorting,
    rows_written_back,
    added_to_tokens,
    scattered_to_tokens,
    tokens_of_each_choice,
    accumulated,
]


def running_sum(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD).cumsum(0)
    return y_RD[row_R.argsort()].view(-1, K, D).sum(1)


def numbered(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * torch.arange(row_R.shape[0]).unsqueeze(-1)
    return y_RD[row_R.argsort()].view(-1, K, D).sum(1)


def in_groups(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    return apply(x_ND[row_R // K], expert_R, w_EDD).view(-1, K, D).sum(1)


def beside_unsorted(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * weight_NK.reshape(-1, 1)
    return y_RD[row_R.argsort()].view(-1, K, D).sum(1)


def place_as_number(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * row_R.unsqueeze(-1)
    return y_RD[row_R.argsort()].view(-1, K, D).sum(1)


def neighbour(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    y_RD = apply(x_ND[(row_R // K + 1) % x_ND.shape[0]], expert_R, w_EDD)
    return y_RD[row_R.argsort()].view(-1, K, D).sum(1)


def rank_as_place(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """An error of the author's, but what it computes is what it computes."""
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    return apply(x_ND[row_R // K], expert_R, w_EDD)[row_R].view(-1, K, D).sum(1)


def summed_over_rows(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD)
    return x_ND * y_RD.sum(0)


SEEN = [
    running_sum,
    numbered,
    in_groups,
    beside_unsorted,
    place_as_number,
    neighbour,
    rank_as_place,
    summed_over_rows,
]


def verify(body: Body, mesh: dict[str, int], batch: int = B, **options: Any) -> spcompile.Report:
    x_BSD = torch.randn(batch, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    report = spcompile.verify(Mixture(body), (x_BSD,), mesh=mesh, compiler="eager", tolerance=1e-10, **options)
    assert report.ok, str(report)
    return report


@pytest.mark.thinned(3, covers=["body"])
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"dp": 2}], ids=str)  # 3 ranks have padding
@pytest.mark.parametrize("body", UNSEEN)
def test_each_rank_sorts_its_own_rows(body: Body, mesh: dict[str, int], attention: str) -> None:
    if attention == "ulysses" and mesh != {"cp": 2}:
        attention = "auto"
    report = verify(body, mesh, attention=attention)
    assert not GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(3, covers=["body"])
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"dp": 2}, {"cp": 3}], ids=str)
@pytest.mark.parametrize("body", SEEN)
def test_where_the_order_is_seen_all_rows_are_sorted(body: Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mesh", [{"tp": 2, "cp": 2}, {"dp": 2, "cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("body", UNSEEN)
def test_on_more_axes(body: Body, mesh: dict[str, int]) -> None:
    verify(body, mesh, batch=4)
