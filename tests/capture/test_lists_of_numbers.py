"""Tensors that a model reads as Python lists, of a length that depends on data."""

from __future__ import annotations

import mixtures as mx
import pytest
import torch
from mixtures import E, K, verify
from torch import Tensor

from spcompile.diagnostics import GraphBreak


def counted(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.flatten().argsort(stable=True)
    sizes = torch.bincount(expert_NK.flatten(), minlength=E).cpu().tolist()
    parts = x_ND[row_R // K].split(sizes)
    y_RD = torch.cat([torch.tanh(part @ w_EDD[number]) for number, part in enumerate(parts)])
    return torch.zeros_like(x_ND).index_add(0, row_R // K, y_RD * weight_NK.flatten()[row_R][:, None])


def added_up(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """The ends of groups as a list, and what is between them as slices."""
    row_R = expert_NK.flatten().argsort(stable=True)
    y_ND, start = torch.zeros_like(x_ND), 0
    for number, end in enumerate(expert_NK.flatten().bincount(minlength=E).cumsum(0).tolist()):
        token = row_R[start:end] // K
        y_ND.index_add_(0, token, weight_NK.flatten()[row_R[start:end]][:, None] * (x_ND[token] @ w_EDD[number]))
        start = end
    return y_ND


def element_by_element(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    share = [count / expert_NK.numel() for count in torch.bincount(expert_NK.flatten(), minlength=E)]
    return x_ND * sum(part * part for part in share)


def more_than_said(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    return x_ND * torch.bincount(expert_NK.flatten() + 1, minlength=E).tolist()[0]


def of_places(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    return x_ND * len(torch.nonzero(expert_NK.flatten() == 1)[:, 0].tolist())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("body", [counted, added_up, element_by_element])
@pytest.mark.parametrize("axis", ["cp", "tp", "dp"])
def test_counts_have_the_length_that_the_call_says(body: mx.Body, axis: str) -> None:
    report = verify(body, {axis: 2})
    assert body is not counted or not mx.GATHERS & {remark.code for remark in report.remarks}, str(report)


def test_more_counts_than_that_are_an_error_when_it_runs() -> None:
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        verify(more_than_said, {"cp": 2})


def test_any_other_length_ends_the_graph() -> None:
    with pytest.raises(GraphBreak, match="a list of numbers whose length depends on data"):
        verify(of_places, {"cp": 2})
    verify(of_places, {"cp": 2}, on_graph_break="gather")
