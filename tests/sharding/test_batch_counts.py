"""Axis dp: what the model computes from its number of entries, and decides by it, is about the entries of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile

S, D, V = 6, 4, 5


class Scored(nn.Module):
    """Logits over [B, S], then what `loss` makes of them."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.w_DD = nn.Parameter(torch.randn(D, D, dtype=torch.float64))
        self.head_DV = nn.Parameter(torch.randn(D, V, dtype=torch.float64))

    def forward(self, x_BSD: Tensor, y_BS: Tensor) -> Tensor:
        h_B1SD = (x_BSD @ self.w_DD).unsqueeze(1)
        out_BSD = F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1)
        return self.loss(out_BSD @ self.head_DV, y_BS)


def summed(logits_BSV: Tensor, y_BS: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(logits_BSV.flatten(0, 1), y_BS.flatten(), reduction=reduction)


COUNTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entries": lambda z, y: summed(z, y) / y.shape[0],
    "tokens": lambda z, y: summed(z, y) / y.numel(),
    "numbers": lambda z, y: z.square().sum() / z.numel(),
    "tokens but the first": lambda z, y: summed(z[:, :-1], y[:, 1:]) / y[:, 1:].numel(),
    "one over tokens": lambda z, y: summed(z, y) * (1 / y.numel()),
    "a tensor": lambda z, y: summed(z, y) / torch.tensor(y.numel()),
    "batch mean": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / V), reduction="batchmean"),
    "before the sum": lambda z, y: (z.square().sum((1, 2)) / len(z)).sum(),
    "behind another op": lambda z, y: (summed(z, y) + z.square().sum()).sqrt() / y.shape[0],
}
RIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "means of two": lambda z, y: (summed(z, y, "mean") + z.square().mean()) / 2,
    "half of a mean": lambda z, y: 0.5 * summed(z, y, "mean"),
    "half of a quotient": lambda z, y: ((z.sum(-1) * (y > 2)).sum() / (y > 2).sum().clamp(min=1)) / 2,
    "another number": lambda z, y: summed(z, y) / 7 * 0.01,
    "a sum of ones": lambda z, y: summed(z, y) / torch.ones_like(y).sum(),
    "mask of ones": lambda z, y: (lambda m: (z.square().sum(-1) * m).sum() / m.sum())(torch.ones(y.shape).double()),
}


def verify(loss: Callable[..., Tensor], entries: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(2 * entries, S, D, dtype=torch.float64, generator=generator)
    y_BS = torch.randint(V, (2 * entries, S), generator=generator)
    return spcompile.verify(Scored(loss), {"x_BSD": x_BSD, "y_BS": y_BS}, mesh={"dp": 2})


@pytest.mark.thinned(30)
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("name", COUNTED)
def test_what_counts_entries_counts_those_of_all_ranks(name: str, entries: int) -> None:
    report = verify(COUNTED[name], entries)
    assert report.ok, str(report)


COUNTED_ANYWHERE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tokens without padding": lambda z, y: summed(z, y) / (y.numel() - (y == 0).sum()),
    "times entries": lambda z, y: summed(z, y, "mean") * len(z),
    "a variance": lambda z, y: (z - z.mean(0)).square().sum(0).mean() / (len(z) - 1),
    "root of entries": lambda z, y: z.square().sum() / math.sqrt(len(z)),
    "weights": lambda z, y: z.square().mean((1, 2)) @ torch.full((len(z),), 1 / len(z), dtype=z.dtype),
    "ones over entries": lambda z, y: (z.square().mean((1, 2)) * (torch.ones(len(z)) / len(z))).sum(),
    "in every element": lambda z, y: (z / len(z)).tanh().mean(),
    "an output": lambda z, y: z.square().mean() + len(z),
    "entries of a tensor that is not read": lambda z, y: z.square().sum() / len(y),
}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("name", COUNTED_ANYWHERE)
@pytest.mark.parametrize("entries", [1, 3])
def test_counts_anywhere(name: str, entries: int) -> None:
    report = verify(COUNTED_ANYWHERE[name], entries)
    assert report.ok, str(report)


DECIDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a logarithm": lambda z, y: summed(z, y, "mean") * math.log(1 + len(z)),
    "a branch": lambda z, y: summed(z, y, "mean") * (2 if len(z) > 3 or len(z) == 2 else 1),
    "a table": lambda z, y: summed(z, y, "mean") * {1: 1.0, 2: 3.0, 3: 1.0, 6: 2.0}[len(z)],
    "a loop": lambda z, y: sum((z.square().mean() / i for i in range(1, 1 + len(z))), start=z.sum()),
    "a text": lambda z, y: summed(z, y, "mean") * float(f"{len(z)}"),
}


@pytest.mark.thinned(25)
@pytest.mark.parametrize("name", DECIDED)
@pytest.mark.parametrize("entries", [1, 3])
def test_a_program_is_the_one_for_all_entries(name: str, entries: int) -> None:
    report = verify(DECIDED[name], entries)
    assert report.ok, str(report)


def test_branches_that_all_entries_take_as_well() -> None:
    report = verify(lambda z, y: z.square().mean() * (2 if len(z) > 1 and len(z) % 2 == 0 else 3), 2)
    assert report.ok, str(report)


def advantages(groups: Tensor) -> Tensor:
    return (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-3)


GROUPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "advantages": lambda z, y: (z.mean((1, 2)) * advantages(y[:, 0].double().view(-1, 2)).view(-1)).mean(),
    "pairs": lambda z, y: (lambda p: F.logsigmoid(p[:, 0] - p[:, 1]).mean())(z.square().sum((1, 2)).view(-1, 2)),
    "best": lambda z, y: z.square().sum((1, 2)).view(len(y) // 2, 2).amax(1).mean(),
}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("entries", [2, 4])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_entries(name: str, entries: int) -> None:
    report = verify(GROUPS[name], entries)
    assert report.ok, str(report)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("entries", [2, 4])
def test_a_part_of_the_batch_on_every_rank(entries: int) -> None:
    report = verify(lambda z, y: z.mean((1, 2)).view(2, -1).mean(1).square().sum(), entries)
    assert report.ok, str(report)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", RIGHT)
def test_what_counts_all_entries_is_right(name: str) -> None:
    report = verify(RIGHT[name], 2)
    assert report.ok, str(report)


@pytest.mark.thinned(2)
def test_a_mask_of_ones_has_all_entries() -> None:
    report = verify(RIGHT["mask of ones"], 1)
    assert report.ok, str(report)
