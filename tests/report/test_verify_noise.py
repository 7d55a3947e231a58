"""What rounding makes of a model is measured on it: numbers move by a unit of their own dtype, marks do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile import verify
from spcompile.report.noise import moved

F64 = torch.float64


def units(x: Tensor) -> Tensor:
    """How far a draw moves each element, in what separates it from its neighbour in the same binade."""
    change = moved(x, torch.Generator().manual_seed(1)).double() - x.double()
    spacing = torch.ldexp(
        torch.full_like(x, torch.finfo(x.dtype).eps, dtype=F64), torch.frexp(x.double().abs()).exponent - 1
    )
    return change / spacing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_numbers_move_by_one_unit_of_their_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([0.7, -0.7, 1.5, 3.25e-4, 300.5], dtype=dtype)
    assert units(x).abs().tolist() == [1.0] * 5


def test_marks_stay() -> None:
    for marks in ([0.0, 1.0], [0.0, -torch.inf], [0.0, torch.finfo(F64).min]):
        assert units(torch.tensor(marks, dtype=F64)).nan_to_num().tolist() == [0.0, 0.0]
    excluded = torch.tensor([0.3, -1e9 + 0.3, 0.0, -torch.inf], dtype=F64)
    assert moved(excluded, torch.Generator())[1:].tolist() == excluded[1:].tolist()


class InTheMidst(nn.Module):
    """Float64, but one step of it; its scores are large."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.heads, self.out = nn.Linear(8, 24, dtype=F64), nn.Linear(8, 8, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(8 * x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out((self.weights(q @ k.mT).to(v.dtype) @ v).transpose(1, 2).flatten(2)).square().mean()

    def weights(self, scores: Tensor) -> Tensor:
        """Of the keys."""
        return scores.to(self.dtype).softmax(-1)


class Inside(InTheMidst):
    """The step is not one of its own."""

    def weights(self, scores: Tensor) -> Tensor:
        """Of the keys."""
        return scores.softmax(-1, dtype=self.dtype)


def test_conversions_inside_of_a_call_round_as_much_as_those_before_it() -> None:
    x = torch.randn(2, 9, 8, dtype=F64)
    tolerances = [verify(kind(torch.float32), (x,), mesh={"cp": 2}).tolerance for kind in (InTheMidst, Inside)]
    assert tolerances[0] == tolerances[1] > 1e-10


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_rounds_more(dtype: torch.dtype) -> None:
    """What is compared closer is what does not come through that step."""
    report = verify(InTheMidst(dtype), (torch.randn(2, 9, 8, dtype=F64),), mesh={"cp": 2})
    assert report.ok, str(report)
    assert report.tolerance > 1e-10


@pytest.mark.thinned(2)
def test_where_no_number_rounds_more_nothing_more_is_allowed() -> None:
    report = verify(InTheMidst(F64), (torch.randn(2, 9, 8, dtype=F64),), mesh={"cp": 2})
    assert report.ok, str(report)
    assert report.tolerance == 1e-10


class LeftPadded(nn.Module):
    """A float mask whose least number excludes all keys of the rows of padding, and gives them a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(8, 24, dtype=F64)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = self.heads(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        S = x.shape[1]
        keep = torch.ones(S, S, dtype=torch.bool, device=x.device).tril() & valid[:, None, None, :]
        mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, mask).square().mean()


@pytest.mark.thinned(3)
def test_attention_is_compared_with_its_formula() -> None:
    """The flash kernel of CPUs has other gradients for rows that a large number leaves no key."""
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    report = verify(LeftPadded(), (torch.randn(2, 9, 8, dtype=F64), valid), mesh={"cp": 2})
    assert report.ok, str(report)
    assert report.tolerance == 1e-10


def test_what_rounds_several_times_inside_moves_as_often() -> None:
    """The noise of one draw, added up over rows, grows with the root of the number of roundings."""
    x = torch.linspace(1.1, 1.9, 4000, dtype=F64)
    once, often = (
        (moved(x, torch.Generator().manual_seed(1), n) - x).div(torch.finfo(F64).eps).square().mean() for n in (1, 4)
    )
    assert once == 1.0
    assert 3.5 < often < 4.5
