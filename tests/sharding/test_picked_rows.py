"""Rows picked by a loop over experts: each rank picks its own where nobody sees how many there are, or which is next.

Shape suffixes are those of `mixtures`. P rows are picked.
"""

from __future__ import annotations

import mixtures as mx
import pytest
import torch
from mixtures import GATHERS, D, verify
from torch import Tensor


def numbered(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    (token_P,) = torch.where(expert_NK[:, 0] == 1)
    y_PD = (x_ND[token_P] @ w_EDD[0]) * torch.arange(token_P.shape[0]).unsqueeze(-1)
    return x_ND.index_add(0, token_P, y_PD)


def last_row_first(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    (token_P,) = torch.where(expert_NK[:, 0] == 1)
    return x_ND.index_add(0, token_P, (x_ND[token_P] @ w_EDD[0]).flip(0))


def share_of_rows(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """How many rows an expert has is a number of all ranks' rows."""
    (token_P,) = torch.where(expert_NK[:, 0] == 1)
    return x_ND.index_add(0, token_P, x_ND[token_P] @ w_EDD[0]) * token_P.shape[0]


def mean_of_rows(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    (token_P,) = torch.where(expert_NK[:, 0] == 1)
    return x_ND + x_ND[token_P].sum(0)


def beside_a_blank(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    (token_P,) = torch.where(expert_NK[:, 0] == 1)
    ones_PD = torch.ones(token_P.shape[0], D, dtype=x_ND.dtype)
    return x_ND.index_add(0, token_P, ones_PD + x_ND[token_P] @ w_EDD[0])


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"dp": 2}, {"dp": 2, "cp": 2}, {"tp": 2, "cp": 2}], ids=str)
@pytest.mark.parametrize("body", [mx.picked_and_written, mx.picked_and_added])
def test_each_rank_picks_its_own_rows(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh, batch=4)
    if len(mesh) == 1:
        assert not GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(28)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}], ids=str)
@pytest.mark.parametrize("body", [numbered, last_row_first, share_of_rows, mean_of_rows, beside_a_blank])
def test_rows_picked_among_those_of_all_ranks(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert GATHERS & {remark.code for remark in report.remarks}, str(report)
