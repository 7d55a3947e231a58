"""Rows sorted by experts: each rank sorts its own where nobody sees the order, and all ranks' rows where somebody does.

Shape suffixes are those of `mixtures`.
"""

from __future__ import annotations

import mixtures as mx
import pytest
import torch
from mixtures import GATHERS, D, K, apply, verify
from torch import Tensor

import spcompile

UNSEEN = [
    mx.inverse_by_writing,
    mx.inverse_by_sorting,
    mx.rows_written_back,
    mx.added_to_tokens,
    mx.scattered_to_tokens,
    mx.tokens_of_each_choice,
    mx.accumulated,
    mx.one_expert_a_token,
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


@pytest.mark.thinned(30)
@pytest.mark.parametrize(
    ("mesh", "attention"),
    [({"cp": 2}, "ring"), ({"cp": 2}, "ulysses"), ({"cp": 3}, "auto"), ({"dp": 2}, "auto")],  # 3 ranks have padding
    ids=str,
)
@pytest.mark.parametrize("body", UNSEEN)
def test_each_rank_sorts_its_own_rows(body: mx.Body, mesh: dict[str, int], attention: str) -> None:
    report = verify(body, mesh, attention=attention)
    assert not GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"dp": 2}, {"cp": 3}], ids=str)
@pytest.mark.parametrize("body", SEEN)
def test_where_the_order_is_seen_all_rows_are_sorted(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"tp": 2, "cp": 2}, {"dp": 2, "cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("body", UNSEEN)
def test_on_more_axes(body: mx.Body, mesh: dict[str, int]) -> None:
    verify(body, mesh, batch=4)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("body", [*UNSEEN, mx.picked_and_added])
def test_a_length_that_is_a_symbol(body: mx.Body) -> None:
    x_BSD = mx.states()
    torch._dynamo.mark_dynamic(x_BSD, 1)
    report = spcompile.verify(mx.Mixture(body), (x_BSD,), mesh={"cp": 2}, compiler="eager", tolerance=1e-10)
    assert report.ok, str(report)
    assert not {"SPR103", "SPR107"} & {remark.code for remark in report.remarks}, str(report)
