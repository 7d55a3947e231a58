"""Cross entropy over split classes: every rank's result and gradients, against torch on the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile.sharding.rules.rule import LocalCall
from spcompile.sharding.rules.vocabulary import vocabulary_parallel

NONE, SUM = 0, 2


class _Ranks:
    """One rank; what the others send was computed before."""

    def __init__(self, rank: int, size: int, others: list[Tensor]) -> None:
        self.rank, self.size, self.others, self.sent = rank, size, others, torch.empty(0)

    def first(self, length: int, device: torch.device) -> Tensor:
        return torch.tensor(self.rank * self.size)

    def gather(self, x: Tensor) -> Tensor:
        self.sent = x.detach()
        return torch.stack([x if rank == self.rank else part for rank, part in enumerate(self.others or [x])])


def _run(parts: list[Tensor], target: Tensor, classes: int, *options: Any) -> list[Tensor]:
    def on(rank: int, others: list[Tensor]) -> tuple[Tensor, Tensor]:
        ranks = _Ranks(rank, parts[0].shape[1], others)
        call = LocalCall((parts[rank], target, None, *options), {}, ((),), "b", classes, len(parts), ranks)
        result = vocabulary_parallel(call)
        return result, ranks.sent

    sent = [on(rank, [])[1] for rank in range(len(parts))]
    return [on(rank, sent)[0] for rank in range(len(parts))]


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("reduction", [NONE, SUM])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [12, 7])
def test_every_rank_has_the_whole_loss_and_its_gradient(
    degree: int, reduction: int, smoothing: float, classes: int
) -> None:
    torch.manual_seed(0)
    logits = (30 * torch.randn(5, classes, dtype=torch.float64)).requires_grad_()
    target = torch.tensor([0, -100, classes - 1, 3, 2])
    expected = torch.ops.aten.cross_entropy_loss.default(logits, target, None, reduction, -100, smoothing)
    upstream = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, logits, upstream)

    local = -(-classes // degree)
    padding = torch.full((5, local * degree - classes), 1e9, dtype=torch.float64)  # must not count
    whole = torch.cat([logits.detach(), padding], 1)
    parts = [part.clone().requires_grad_() for part in whole.split(local, 1)]
    found = _run(parts, target, classes, reduction, -100, smoothing)
    grads = [torch.autograd.grad(result, part, upstream)[0] for result, part in zip(found, parts, strict=True)]

    for result in found:
        torch.testing.assert_close(result, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(grads, 1)[:, :classes], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", [NONE, SUM])
def test_classes_before_other_dims(reduction: int) -> None:
    """Logits [A, C, S], as cross_entropy takes a transposed sequence."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 3, dtype=torch.float64)
    target = torch.tensor([[0, -100, 5], [3, 2, 1]])
    expected = torch.ops.aten.cross_entropy_loss.default(logits, target, None, reduction)
    parts = list(logits.split(3, 1))
    sent = [_rank_of(rank, part, [], target, reduction)[1] for rank, part in enumerate(parts)]
    for rank, part in enumerate(parts):
        found = _rank_of(rank, part, sent, target, reduction)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _rank_of(rank: int, part: Tensor, others: list[Tensor], target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    ranks = _Ranks(rank, part.shape[1], others)
    call = LocalCall((part, target, None, reduction, -100, 0.0), {}, ((),), "b", 6, 2, ranks)
    return vocabulary_parallel(call), ranks.sent


def test_half_precision_logits_are_reduced_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 8, dtype=torch.bfloat16)
    target = torch.randint(0, 8, (64,))
    (found, _) = _run(list(logits.split(4, 1)), target, 8, SUM, -100, 0.0)
    expected = torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")
    assert found.dtype == torch.bfloat16
    assert found == expected.to(torch.bfloat16)
