"""Rows split in groups by counts that are read as numbers: each rank splits the rows that it sorts."""

from __future__ import annotations

import mixtures as mx
import pytest
import torch
import torch.nn.functional as F
from mixtures import GATHERS, E, K, verify
from torch import Tensor


def of_each(parts: tuple[Tensor, ...], w_EDD: Tensor) -> Tensor:
    return torch.cat([F.gelu(part @ w_EDD[number]) for number, part in enumerate(parts)], 0)


def split_by(counts: object, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.flatten().sort()
    token_R = row_R.div(K, rounding_mode="trunc")
    sizes = counts(expert_NK, expert_R).tolist()  # type: ignore[operator]
    y_RD = of_each(x_ND[token_R].split(sizes), w_EDD) * weight_NK.flatten()[row_R][:, None]
    return torch.zeros_like(x_ND).index_add(0, token_R, y_RD)


def by_scattered_ones(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    def counts(expert_NK: Tensor, _: Tensor) -> Tensor:
        return torch.zeros(expert_NK.shape[0], E).scatter(1, expert_NK, 1).long().sum(0)

    return split_by(counts, x_ND, expert_NK, weight_NK, w_EDD)


def by_added_ones(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    def counts(expert_NK: Tensor, _: Tensor) -> Tensor:
        return torch.zeros(E, dtype=torch.long).scatter_add_(
            0, expert_NK.flatten(), torch.ones_like(expert_NK.flatten())
        )

    return split_by(counts, x_ND, expert_NK, weight_NK, w_EDD)


def by_one_hot(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    return split_by(lambda _, expert_R: F.one_hot(expert_R, E).sum(0), x_ND, expert_NK, weight_NK, w_EDD)


def what_may_be_less(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """Rows beyond all groups are cut off in front of the experts and are zeros behind them. There are none."""
    row_R = torch.argsort(expert_NK.view(-1), stable=True)
    token_RD = (row_R // K).reshape(-1, 1).expand(-1, x_ND.shape[1])
    rows_RD = torch.gather(x_ND, 0, token_RD)
    sizes = torch.histc(expert_NK.view(-1).float(), bins=E, min=0, max=E).long().tolist()
    y_RD = of_each(torch.split(rows_RD[: sum(sizes)], sizes, dim=0), w_EDD)
    y_RD = torch.vstack((y_RD, y_RD.new_zeros((rows_RD.shape[0] - sum(sizes), y_RD.shape[-1]))))
    return torch.zeros_like(x_ND).scatter_add(0, token_RD, y_RD * weight_NK.view(-1)[row_R][:, None])


def with_a_loss_of_balance(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """The same counts are those of all ranks' rows for what else reads them."""
    counts_E = F.one_hot(expert_NK, E).sum((0, 1))
    y_ND = split_by(lambda *_: counts_E, x_ND, expert_NK, weight_NK, w_EDD)
    return y_ND * (counts_E / expert_NK.numel()).square().sum()


def in_another_order(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """The first group has as many rows as the last expert: nobody wants that, but it means what it means."""
    return split_by(lambda ids, _: F.one_hot(E - 1 - ids, E).sum((0, 1)), x_ND, expert_NK, weight_NK, w_EDD)


def put_together_in_another_order(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.flatten().argsort()
    parts = x_ND[row_R // K].split(F.one_hot(expert_NK, E).sum((0, 1)).tolist())
    y_RD = torch.cat([part.tanh() for part in parts[::-1]])
    return torch.zeros_like(x_ND).index_add(0, row_R // K, y_RD * weight_NK.flatten()[row_R][:, None])


def summed(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """A group is read as a whole."""
    row_R = expert_NK.flatten().argsort()
    parts = x_ND[row_R // K].split(F.one_hot(expert_NK, E).sum((0, 1)).tolist())
    y_RD = torch.cat([part - part.sum(0) for part in parts])
    return torch.zeros_like(x_ND).index_add(0, row_R // K, y_RD)


def in_the_size_of_a_group(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.flatten().argsort()
    sizes = F.one_hot(expert_NK, E).sum((0, 1)).tolist()
    parts = x_ND[row_R // K].split(sizes)
    y_RD = torch.cat([part * torch.arange(size)[:, None] for part, size in zip(parts, sizes, strict=True)])
    return torch.zeros_like(x_ND).index_add(0, row_R // K, y_RD)


@pytest.mark.thinned(15)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"dp": 2}], ids=str)
@pytest.mark.parametrize(
    "body", [by_scattered_ones, by_added_ones, by_one_hot, what_may_be_less, with_a_loss_of_balance]
)
def test_each_rank_has_groups_of_its_own(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert not GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(15)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("body", [in_another_order, put_together_in_another_order, summed, in_the_size_of_a_group])
def test_groups_of_all_rows(body: mx.Body, mesh: dict[str, int]) -> None:
    report = verify(body, mesh)
    assert "tp" in mesh or GATHERS & {remark.code for remark in report.remarks}, str(report)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 2, "cp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_on_other_axes(mesh: dict[str, int]) -> None:
    verify(what_may_be_less, mesh, batch=4)
