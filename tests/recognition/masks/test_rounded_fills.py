"""Large numbers that exclude keys, where scores are rounded to another dtype afterwards, or biases before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recognition import rewrite
from torch import Tensor

B, N, S, H = 2, 2, 9, 4
VALID = torch.arange(S) < torch.tensor([[S], [5]])


def qkv() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, N, S, H, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def pairs(valid: Tensor, number: float) -> Tensor:
    """Rows of padding see no key."""
    keep = valid[:, None, None, :] & valid[:, None, :, None]
    return torch.where(keep, 0.0, number).double()


def cast_at_last(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + pairs(valid, -1e10)).float().softmax(-1).to(v.dtype) @ v


def cast_by_softmax(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + pairs(valid, -1e10)).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def cast_behind_a_bias(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias + pairs(valid, -1e10)).float().softmax(-1).to(v.dtype) @ v


def bias_to_the_fill_first(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + (pairs(valid, -1e12) + bias)).softmax(-1) @ v


def bias_to_the_scores_first(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias + pairs(valid, -1e12)).softmax(-1) @ v


def through_float32(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    """Rounded on the way: nothing of the scores is left in rows without keys, though the softmax is in float64."""
    return (q @ k.mT + pairs(valid, -1e10)).float().double().softmax(-1) @ v


IN_FLOAT32 = [cast_at_last, cast_by_softmax, cast_behind_a_bias, through_float32]
IN_FLOAT64 = [bias_to_the_fill_first, bias_to_the_scores_first]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("model", [*IN_FLOAT32, *IN_FLOAT64], ids=lambda f: f.__name__)
def test_rows_without_keys_are_rounded_as_the_plain_models(model: Callable[..., Any]) -> None:
    """With 1e-5 for the plain model's steps in float32, which are taken in float64 here; wrong rows are far off."""
    bias = torch.randn(N, S, S, dtype=torch.float64, requires_grad=True)
    found = rewrite(model, (*qkv(), VALID, bias), tolerance=1e-5 if model in IN_FLOAT32 else 1e-10)
    assert found.attentions
    assert "SPR202" not in found.codes


def kept_in_part(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, bias: Tensor) -> Tensor:
    """-1e6 leaves something of the scores in float32: neither all nor nothing."""
    return (q @ k.mT + pairs(valid, -1e6)).float().softmax(-1).to(v.dtype) @ v


def test_what_is_rounded_but_not_lost_stays_written_out() -> None:
    found = rewrite(kept_in_part, (*qkv(), VALID, torch.zeros(S, S, dtype=torch.float64)))
    assert found.codes == ["SPR202"]
