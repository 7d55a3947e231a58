"""Groups of sorted rows, each with a matrix of its own: their ends must be those of the rows that a rank sorts."""

from __future__ import annotations

import mixtures as mx
import pytest
import torch
import torch.nn.functional as F
from mixtures import GATHERS, E, K, product, verify, weighted
from torch import Tensor

pytest.importorskip("transformers.integrations.moe")  # it defines the op


def with_ends(ends: object, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    y_RD = product(x_ND[row_R // K], w_EDD, ends(expert_NK, expert_R))  # type: ignore[operator]
    return weighted(y_RD, row_R, weight_NK)


def by_one_hot(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    def ends(expert_NK: Tensor, _: Tensor) -> Tensor:
        return F.one_hot(expert_NK, E).sum((0, 1)).cumsum(0).int()

    return with_ends(ends, x_ND, expert_NK, weight_NK, w_EDD)


def by_comparing(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    def ends(_: Tensor, expert_R: Tensor) -> Tensor:
        return (expert_R.unsqueeze(-1) == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)

    return with_ends(ends, x_ND, expert_NK, weight_NK, w_EDD)


def by_counts_of_unsorted(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    def ends(expert_NK: Tensor, _: Tensor) -> Tensor:
        return torch.histc(expert_NK.double(), E, 0, E).cumsum(0, dtype=torch.int32)

    return with_ends(ends, x_ND, expert_NK, weight_NK, w_EDD)


def of_other_numbers(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """The groups are not those of the rows: nobody wants that, but it means what it means."""

    def ends(expert_NK: Tensor, _: Tensor) -> Tensor:
        return torch.histc((E - 1 - expert_NK).double(), E, 0, E).cumsum(0, dtype=torch.int32)

    return with_ends(ends, x_ND, expert_NK, weight_NK, w_EDD)


def in_descending_order(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(descending=True, stable=True)
    ends_E = torch.histc(expert_R.double(), E, 0, E).cumsum(0, dtype=torch.int32)
    return weighted(product(x_ND[row_R // K], w_EDD, ends_E), row_R, weight_NK)


def of_even_groups(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    ends_E = torch.arange(1, E + 1, dtype=torch.int32) * (expert_R.shape[0] // E)
    return weighted(product(x_ND[row_R // K], w_EDD, ends_E), row_R, weight_NK)


def counted_once(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """Counts of the unsorted numbers, in a cast between the count and the ends, by both."""
    row_R = expert_NK.reshape(-1).argsort(stable=True)
    counts_E = torch.nn.functional.one_hot(expert_NK, E).sum((0, 1)).to(torch.int32)
    y_RD = product(x_ND[row_R // K], w_EDD, counts_E.cumsum(0, dtype=torch.int32))
    return weighted(y_RD, row_R, weight_NK) * (counts_E / expert_NK.numel()).square().sum()


def read_elsewhere(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """How full the groups are is a number of all ranks' rows."""
    expert_R, row_R = expert_NK.reshape(-1).sort(stable=True)
    counts_E = torch.histc(expert_R.double(), E, 0, E - 1)
    y_RD = product(x_ND[row_R // K], w_EDD, counts_E.cumsum(0, dtype=torch.int32))
    return weighted(y_RD, row_R, weight_NK) * counts_E.square().mean()


def with_a_loss_of_balance(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """Each rank's groups are its own; how full experts are is summed over ranks, without their padding."""
    counts_E = torch.histc(expert_NK.flatten().double(), bins=E, min=0, max=E)
    return mx.grouped(x_ND, expert_NK, weight_NK, w_EDD) * (counts_E / expert_NK.numel()).square().sum()


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"dp": 2}], ids=str)
@pytest.mark.parametrize(
    "body",
    [mx.grouped, with_a_loss_of_balance, by_one_hot, by_comparing, by_counts_of_unsorted, counted_once, read_elsewhere],
)
def test_each_rank_has_groups_of_its_own(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert not GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(23)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("body", [of_other_numbers, in_descending_order, of_even_groups])
def test_groups_of_all_rows(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mesh", [{"tp": 2, "cp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_on_two_axes(mesh: dict[str, int]) -> None:
    verify(mx.grouped, mesh, batch=4)
