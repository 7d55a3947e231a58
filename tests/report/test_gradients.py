"""Gradients of plain models: what a leaf's own hooks make of them is left out, and nothing is left behind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spcompile
from spcompile.report.gradients import gradients_of


class Attended(nn.Module):
    """Attention to a sequence of numbers, in a checkpoint that runs a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = checkpoint(lambda z: F.scaled_dot_product_attention(self.inner(z), z, z), x, use_reentrant=True)
        return y


def test_leaves_keep_their_gradients_and_hooks() -> None:
    weight, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    seen: list[Tensor] = []
    weight.register_hook(lambda gradient: gradient * 5)
    weight.register_post_accumulate_grad_hook(seen.append)
    weight.grad = torch.full((2,), 7.0)
    found = gradients_of([(weight * other * 3).sum()], [weight], [torch.tensor(1.0)])
    assert [g.tolist() for g in found if g is not None] == [[3.0, 3.0]]
    assert weight.grad.tolist() == [7.0, 7.0]
    assert other.grad is None
    assert not seen
    (weight * 3).sum().backward()
    assert weight.grad.tolist() == [22.0, 22.0]
    assert len(seen) == 1


def test_a_leaf_without_a_gradient_has_none() -> None:
    weight, unread = (torch.ones(2, requires_grad=True) for _ in range(2))
    found = gradients_of([weight.sum()], [weight, unread], [torch.tensor(1.0)])
    assert found[1] is None


def test_hooks_of_parameters_and_reentrant_checkpoints_are_no_error() -> None:
    torch.manual_seed(0)
    model = Attended().double()
    model.first.weight.register_hook(lambda gradient: gradient * 2 + 1)
    report = spcompile.verify(model, (torch.randn(2, 8, 8, dtype=torch.float64),), {"cp": 2})
    assert report.ok, report


class Twice(nn.Module):
    """Returns one tensor under two names, and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.inner(F.scaled_dot_product_attention(x, x, x))
        return {"first": y, "second": y, "rows": y.flatten(0, 1)}


def test_a_tensor_that_is_returned_twice_has_both_gradients() -> None:
    torch.manual_seed(0)
    report = spcompile.verify(Twice().double(), (torch.randn(2, 8, 8, dtype=torch.float64),), {"cp": 2})
    assert report.ok, report
