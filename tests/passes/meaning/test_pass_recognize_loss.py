"""recognize-loss: means over tokens become quotients of sums, the same numbers on one device and on all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, assert_equal, check_pipeline, nodes_of, on_one_device
from torch import Tensor

LOGITS = (2, 7, 5)


def logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def some_ignored(*shape: int) -> Tensor:
    target = torch.randint(0, 5, shape)
    return torch.where(torch.rand(shape) < 0.4, -100, target)


def weighted(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, 1), target.flatten(), weight)


LOSSES = {
    "mean": lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten()),
    "smoothing": lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten(), label_smoothing=0.2),
    "ignore_index": lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten(), ignore_index=3),
    "classes second": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_split(name: str) -> None:
    target = torch.randint(0, 5, (2, 7)) if name == "ignore_index" else some_ignored(2, 7)
    inputs = [logits(*LOGITS), target]
    program = after_pass("recognize-loss", LOSSES[name], inputs)
    assert nodes_of(program, "aten.cross_entropy_loss")[0].args[3] == 2
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(LOSSES[name], inputs))


LIKELIHOODS = {
    "mean": lambda x, t, w: F.nll_loss(x.flatten(0, 1), t.flatten()),
    "classes second": lambda x, t, w: F.nll_loss(x.transpose(1, 2), t),
    "weights": lambda x, t, w: F.nll_loss(x.flatten(0, 1), t.flatten(), w),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_are_split(name: str) -> None:
    inputs = [logits(*LOGITS), some_ignored(2, 7), torch.rand(5, dtype=torch.float64)]
    program = after_pass("recognize-loss", LIKELIHOODS[name], inputs)
    assert nodes_of(program, "aten.nll_loss_nd")[0].args[3] == 2
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(LIKELIHOODS[name], inputs))


def test_class_weights() -> None:
    inputs = [logits(*LOGITS), some_ignored(2, 7), torch.rand(5, dtype=torch.float64)]
    program = after_pass("recognize-loss", weighted, inputs)
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(weighted, inputs))


def test_no_valid_token_is_nan_as_in_torch() -> None:
    target = torch.full((2, 7), -100)
    program = after_pass("recognize-loss", LOSSES["mean"], [logits(*LOGITS), target])
    (loss,) = program.gm(*program.inputs)
    assert bool(loss.isnan())
    assert bool(LOSSES["mean"](logits(*LOGITS), target).isnan())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_stay(reduction: str) -> None:
    def loss(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1), t.flatten(), reduction=reduction)

    program = after_pass("recognize-loss", loss, [logits(*LOGITS), some_ignored(2, 7)])
    assert program.history.snapshots[-1].report.rewrites == 0


@pytest.mark.thinned(2)
def test_targets_that_are_probabilities_stay() -> None:
    program = after_pass("recognize-loss", F.cross_entropy, [logits(6, 5), torch.rand(6, 5, dtype=torch.float64)])
    assert program.history.snapshots[-1].report.rewrites == 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("degree", [2, 4])
def test_ranks_with_unequal_numbers_of_valid_tokens(degree: int) -> None:
    """All ignored tokens stand on the first ranks: a mean of means would be another number."""

    def model(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        h = (x @ w).unsqueeze(1)
        y = F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)
        return F.cross_entropy(y[:, :-1].flatten(0, 1), target[:, 1:].flatten())

    target = torch.randint(0, 5, (2, 7))
    target[:, :4] = -100
    check_pipeline(model, [logits(*LOGITS), logits(5, 5), target], {"cp": degree}, attention="ring")
