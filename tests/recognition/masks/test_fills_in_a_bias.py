"""A large number in the place of a learned bias excludes keys, and is no number of the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recognition import rewrite
from score_graphs import Layers, causal, lowest_unless
from torch import Tensor, nn

from spcompile import verify

B, N, S, H = 2, 4, 12, 6
LENGTHS = torch.tensor([0, 7])
F64 = torch.finfo(torch.float64).min


def given(*shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, N, S, H)] * 3 + [shape or (N, S, S)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def weigh(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Written out: the gradients of torch's flash kernel are not the formula's in rows without keys."""
    return (q @ k.mT + bias).softmax(-1) @ v


def valid(lengths: Tensor) -> Tensor:
    return (torch.arange(S) < lengths[:, None])[:, None, None, :]


def every_row_has_a_key(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, k, v, torch.where(causal(q, k), bias, F64))


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return (q @ k.mT + bias.masked_fill(~causal(q, k), F64)).softmax(-1) @ v


def padding(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, k, v, torch.where(valid(lengths), bias, F64))


def padding_by_a_scalar_first(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, k, v, torch.where(~valid(lengths), F64, bias))


def two_conditions(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, k, v, torch.where(causal(q, k) & valid(lengths), bias, F64))


READ = {
    every_row_has_a_key: "causal + bias",
    written_out: "causal + bias",
    padding: "key_padding + bias",
    padding_by_a_scalar_first: "key_padding + bias",
    two_conditions: "causal key_padding + bias",
}


@pytest.mark.parametrize("model", READ, ids=lambda f: f.__name__)
def test_one_attention_and_the_bias_without_the_mask(model: Callable[..., Any]) -> None:
    assert rewrite(model, (*given(), LENGTHS)).masks == [READ[model]]


def alibi_inside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    numbers = torch.arange(S, dtype=q.dtype) * 0.1
    return weigh(q, k, v, torch.where(causal(q, k) & valid(lengths), numbers, F64)) + bias.sum()


def test_slopes_inside_are_read_too() -> None:
    assert rewrite(alibi_inside, (*given(), LENGTHS)).masks == ["causal key_padding + alibi"]


def small_number(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    """-1e9 leaves something of scores in float64, in rows without keys."""
    return attend(q, k, v, torch.where(valid(lengths), bias, -1e9))


def learned_outside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    """In rows without keys the second bias has a gradient, and the first has none."""
    return attend(q, k, v, torch.where(valid(lengths), bias[..., :1], F64) + bias)


def numbers_that_only_run_time_tells(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    numbers = lengths.to(q.dtype)[:, None, None, None].expand(-1, 1, S, S)
    return weigh(q, k, v, torch.where(valid(lengths), numbers, F64)) + bias.sum()


def inside_and_outside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, k, v, torch.where(valid(lengths), bias, F64) + bias)


def a_mask_of_numbers_beside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    beside = lowest_unless(causal(q, k), q.dtype) / 4
    return attend(q, k, v, torch.where(valid(lengths), bias, F64 / 4) + beside)


def a_fill_in_a_fill(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    return attend(q, k, v, torch.where(valid(lengths), torch.where(causal(q, k), bias, F64), F64))


def of_each_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    heads = torch.arange(N)[:, None, None] >= 2
    return attend(q, k, v, torch.where(causal(q, k) & heads, bias, F64))


OTHERS = [small_number, learned_outside, numbers_that_only_run_time_tells, inside_and_outside]
OTHERS += [a_mask_of_numbers_beside, a_fill_in_a_fill, of_each_head]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("model", OTHERS, ids=lambda f: f.__name__)
def test_what_is_no_such_case_is_exact_too(model: Callable[..., Any]) -> None:
    rewrite(model, (*given(), LENGTHS))


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"dp": 2}], ids=str)
def test_every_gradient_on_all_ranks(mesh: dict[str, int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(N, S, S, dtype=torch.float64))
            self.layers = Layers(lambda q, k, v, lengths: two_conditions(q, k, v, self.bias, lengths), N)

        def forward(self, x_BSD: Tensor, given: Tensor) -> Tensor:
            out: Tensor = self.layers(x_BSD, given)
            return out

    torch.manual_seed(1)
    x_BSD = torch.randn(B, S, N * H, dtype=torch.float64)
    report = verify(Model(), {"x_BSD": x_BSD, "given": LENGTHS}, mesh=mesh)
    assert report.ok, str(report)
