"""Written-out attention with the query heads of a group in a dim of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recognition import rewrite
from torch import Tensor

B, G, R, S, H, V = 2, 2, 3, 7, 4, 5


def causal() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def softmax(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(), -math.inf).softmax(-1)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries [B, S, G, R, H], keys and values [B, T, G, .], as one splits the heads of projections."""
    return torch.einsum("bgrst,btgv->bsgrv", softmax(torch.einsum("bsgrh,btgh->bgrst", q, k)), v)


def groups_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads as repeat() puts them."""
    q = q.transpose(2, 3)
    return torch.einsum("brgst,btgv->bsrgv", softmax(torch.einsum("bsrgh,btgh->brgst", q, k)), v)


def keys_of_one_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bgrst,btv->bgrsv", softmax(torch.einsum("bsgrh,bth->bgrst", q, k[:, :, 0])), v[:, :, 0])


def product(weigh: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 1).unsqueeze(2) / 2
    return weigh(scores) @ v.transpose(1, 2).unsqueeze(2)


def products(weigh: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: product(weigh, q, k, v)


def shifted(scores: Tensor) -> Tensor:
    scores = torch.where(causal(), scores, -math.inf)
    return F.dropout((scores - scores.amax(-1, keepdim=True)).softmax(-1), 0.1, training=False)


def alibi(scores: Tensor) -> Tensor:
    slopes = torch.arange(1.0, 1 + G * R, dtype=torch.float64).reshape(G, R, 1, 1)
    return softmax(scores - slopes * (torch.arange(S)[:, None] - torch.arange(S)).abs())


FORMS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "einsum": (einsum, "causal"),
    "groups last": (groups_last, "causal"),
    "one key head": (keys_of_one_group, "causal"),
    "matmul": (products(softmax), "causal"),
    "shifted": (products(shifted), "causal"),
    "softcap": (products(lambda s: softmax(torch.tanh(s / 5) * 5)), "causal"),
    "five dims of a mask": (
        products(lambda s: (s + torch.full((1, 1, 1, S, S), -math.inf).triu(1)).softmax(-1)),
        "causal",
    ),
    "slopes": (products(alibi), "causal + alibi"),
}


def qkv() -> tuple[Tensor, ...]:
    shapes = ((B, S, G, R, H), (B, S, G, H), (B, S, G, V))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", FORMS)
def test_groups(name: str) -> None:
    model, mask = FORMS[name]
    found = rewrite(model, qkv())
    assert found.masks == [mask]
    (attention,) = found.attentions
    heads: list[Any] = [attention.args[i].meta["val"].shape[1] for i in (0, 1)]  # type: ignore[union-attr]
    assert heads == [G * R, 1 if name == "one key head" else G]


OTHERS: dict[str, Callable[..., Tensor]] = {
    "weights in another order": lambda q, k, v: torch.einsum(
        "bgrst,btgv->bsgrv", softmax(torch.einsum("bsgrh,btgh->brgst", q, k)).transpose(1, 2), v
    ),
    "weights that are read": lambda q, k, v: (lambda w: torch.einsum("bgrst,btgv->bsgrv", w, v) + w.sum())(
        softmax(torch.einsum("bsgrh,btgh->bgrst", q, k))
    ),
    "no keys summed": lambda q, k, v: torch.einsum(
        "bgrst,bsgv->bsgrv", softmax(torch.einsum("bsgrh,btgh->bgrst", q, k)), v
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    assert not rewrite(OTHERS[name], qkv()).attentions
