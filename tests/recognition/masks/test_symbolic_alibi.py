"""ALiBi in every spelling becomes slopes: nothing of size S x S is left. What only looks like it stays a bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from recognition import Rewritten, qkv, rewrite
from torch import Tensor

LENGTH = 12
SLOPES = 2.0 ** -torch.arange(1.0, 5.0, dtype=torch.float64)
Bias = Callable[[Tensor, Tensor], Tensor]


def distance() -> Tensor:
    return torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]


def tril() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def cumulated(q: Tensor, slopes: Tensor) -> Tensor:
    positions = torch.ones(q.shape[0], LENGTH, dtype=torch.int64).cumsum(-1) - 1
    return (slopes[:, None] * positions[:, None, :]).reshape(-1, 1, LENGTH).view(q.shape[0], 4, 1, LENGTH)


def interleaved(q: Tensor, slopes: Tensor) -> Tensor:
    slopes = torch.pow(2, -torch.arange(1, 5).to(q.dtype)).view(1, 4, 1, 1)
    slopes = torch.cat([slopes[:, 1::2], slopes[:, ::2]], 1)
    return torch.arange(1 - LENGTH, 1, dtype=torch.int32).view(1, 1, 1, LENGTH) * slopes


FORMS: dict[str, Bias] = {
    "distance": lambda q, slopes: slopes[:, None, None] * distance(),
    "negated": lambda q, slopes: -(slopes.view(1, 4, 1, 1) * distance().T[None, None].to(q.dtype)),
    "absolute": lambda q, slopes: slopes[:, None, None] * -distance().abs(),
    "keys alone": lambda q, slopes: slopes[:, None, None] * torch.arange(LENGTH),
    "from the end": interleaved,
    "of a cumulated mask": cumulated,
    "of floating positions": lambda q, slopes: torch.arange(LENGTH, dtype=q.dtype) * slopes[None, :, None, None] * 0.5,
    "two": lambda q, slopes: slopes[:, None, None] * distance() + torch.arange(LENGTH) / 4,
    "divided": lambda q, slopes: distance().to(q.dtype) / 8 * slopes[:, None, None],
}


def attend(bias: Bias, causal: bool = True) -> Callable[..., Tensor]:
    def model(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(6) + bias(q, slopes)
        return (scores.masked_fill(~tril(), -math.inf) if causal else scores).softmax(-1) @ v

    return model


def without_squares(found: Rewritten) -> bool:
    return (LENGTH, LENGTH) not in {size[-2:] for size in found.sizes()}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", FORMS)
def test_written_out(name: str) -> None:
    found = rewrite(attend(FORMS[name]), (*qkv(), SLOPES))
    assert found.masks == ["causal + alibi"]
    assert found.attentions[0].args[11].meta["val"].shape == (4,)  # type: ignore[union-attr]
    assert without_squares(found), found.text
    assert not found.remarks.rows


def test_in_a_mask_of_sdpa() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        mask = torch.where(tril(), slopes[:, None, None] * distance(), -math.inf)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found = rewrite(model, (*qkv(), SLOPES))
    assert found.masks == ["causal + alibi"]
    assert without_squares(found)


def test_without_a_mask() -> None:
    assert rewrite(attend(FORMS["distance"], causal=False), (*qkv(), SLOPES)).masks == ["full + alibi"]


def test_absolute_distance_needs_a_causal_mask() -> None:
    assert rewrite(attend(FORMS["absolute"], causal=False), (*qkv(), SLOPES)).masks == ["full + bias"]


def test_what_is_equal_for_all_keys_is_dropped() -> None:
    def rows(q: Tensor, slopes: Tensor) -> Tensor:
        return slopes[:, None, None] * torch.arange(LENGTH)[:, None] + 3.0

    found = rewrite(attend(rows), (*qkv(), SLOPES))
    assert found.masks == ["causal"]


@pytest.mark.parametrize(("name", "expected"), [("distance", "causal + alibi"), ("keys alone", "causal + bias")])
def test_beside_sinks_the_constant_counts(name: str, expected: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        scores = (q @ k.mT + FORMS[name](q, slopes)).masked_fill(~tril(), -math.inf)
        joined = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, LENGTH, 1)], -1)
        return joined.softmax(-1)[..., :-1] @ v

    sinks = torch.tensor([0.1, 1.0, -1.0, 3.0], dtype=torch.float64).requires_grad_()
    assert rewrite(model, (*qkv(), SLOPES, sinks)).masks == [expected]


LOOKALIKES: dict[str, Bias] = {
    "squared": lambda q, slopes: slopes[:, None, None] * distance() ** 2,
    "by sequence": lambda q, slopes: slopes[:, None, None] * distance() * torch.arange(1, 3).view(2, 1, 1, 1),
    "half": lambda q, slopes: (slopes[:, None, None].bfloat16() * torch.arange(LENGTH).bfloat16()).to(q.dtype),
    "clamped": lambda q, slopes: slopes[:, None, None] * distance().clamp(min=-4),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay_a_bias(name: str) -> None:
    assert rewrite(attend(LOOKALIKES[name]), (*qkv(), SLOPES)).masks[0] == "causal + bias"


def test_learned_slopes_stay_a_bias_with_their_gradient() -> None:
    found = rewrite(attend(FORMS["distance"]), (*qkv(), SLOPES.clone().requires_grad_()))
    assert found.masks == ["causal + bias"]
