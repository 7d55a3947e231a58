"""Losses and means in half precision: all ranks give what float32 gives, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, compiled_locally, copies, leaves_of, nodes_of
from torch import Tensor

from spcompile.check.simulate import Simulator
from spcompile.machine.mesh import MeshShape

HALVES = [torch.bfloat16, torch.float16]
TOKENS = 1001  # bfloat16 has 1000 and 1004


def attended(h: Tensor) -> Tensor:
    """Its operand [1, 1, TOKENS, 8], beside an attention, from which ranks get their rows."""
    return h + 0 * F.scaled_dot_product_attention(h, h, h)


def cross_entropy(h: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(attended(h)[0, 0], t)


def weighted(h: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(attended(h)[0, 0], t, (torch.arange(8) / 8 + 0.5).to(h.dtype), label_smoothing=0.1)


def likelihood(h: Tensor, t: Tensor) -> Tensor:
    return F.nll_loss(attended(h)[0, 0].log_softmax(-1), t)


def by_hand(h: Tensor, t: Tensor) -> Tensor:
    loss = F.cross_entropy(attended(h)[0, 0], t, reduction="none", ignore_index=3)
    valid = (t != 3).to(loss.dtype)
    return (loss * valid).sum() / valid.sum()


def sum_of_losses(h: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(attended(h)[0, 0], t, reduction="sum")


def mean(h: Tensor, t: Tensor) -> Tensor:
    return attended(h).square().mean()


def mean_over_rows(h: Tensor, t: Tensor) -> Tensor:
    return attended(h).mean(2).sum()


def mse(h: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(attended(h), 2 * h.detach())


def dot(h: Tensor, t: Tensor) -> Tensor:
    loss = F.cross_entropy(attended(h)[0, 0], t, reduction="none")
    return torch.dot(loss, torch.full_like(loss, 1 / TOKENS))


RECOGNISED = (cross_entropy, weighted, likelihood, sum_of_losses, mse)
LOSSES = (*RECOGNISED, by_hand, mean, mean_over_rows, dot)  # the others round more than once, as the plain model does


def numbers(function: Callable[..., Any], inputs: list[Any]) -> tuple[Tensor, Tensor]:
    given = copies(inputs)
    result = function(*given)
    loss = result[0] if isinstance(result, (tuple, list)) else result
    (gradient,) = torch.autograd.grad(loss, leaves_of(given))
    return loss.detach(), gradient


def inputs(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h = (scale * torch.randn(1, 1, TOKENS, 8, generator=generator)).to(dtype)
    return h.requires_grad_(), torch.randint(0, 8, (TOKENS,), generator=generator)


def on_ranks(function: Callable[..., Any], given: tuple[Tensor, Tensor], mesh: dict[str, int]) -> Any:
    """(program, loss, gradient): those of the first rank; gradients of inputs are whole on each."""
    program, _, arguments = compiled_locally(function, given, mesh)
    ranks = MeshShape.of(mesh).world_size
    copied = [copies(arguments) for _ in range(ranks)]
    found = Simulator(MeshShape.of(mesh)).run(program.gm, copied)
    losses = [out[0] for out in found]
    leaves = [leaf for one in copied for leaf in leaves_of(one)]
    gradients = torch.autograd.grad(losses, leaves, [torch.ones_like(x) for x in losses])
    return program, losses[0].detach(), gradients[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.thinned(10)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_losses_are_those_of_float32_rounded(loss: Callable[..., Any], dtype: torch.dtype) -> None:
    given = inputs(dtype)
    h, t = given
    exact = numbers(loss, [h.detach().float().requires_grad_(), t])
    program, value, gradient = on_ranks(loss, given, {"cp": 2})
    assert program.is_sharded
    assert value.dtype == gradient.dtype == dtype
    half_a_unit = torch.finfo(dtype).eps / 2  # of bfloat16: 2**-8
    for found, wanted, plain in zip((value, gradient), exact, numbers(loss, [*given]), strict=True):
        allowed = half_a_unit if loss in RECOGNISED else max(half_a_unit, relative(plain, wanted))
        assert relative(found, wanted) <= allowed


def test_a_mean_whose_sum_float16_cannot_hold() -> None:
    """1001 tokens of a loss of about 100 each: their sum is over 65504."""
    given = inputs(torch.float16, 100.0)
    _, value, gradient = on_ranks(cross_entropy, given, {"cp": 2})
    assert bool(value.isfinite())
    exact = numbers(cross_entropy, [given[0].detach().float().requires_grad_(), given[1]])
    assert relative(value, exact[0]) <= 2**-11
    assert relative(gradient, exact[1]) <= 2**-11


def test_the_count_of_tokens_is_not_rounded() -> None:
    """1001 losses of ln 8 make ln 8, not 1001/1000 of it."""
    given = (torch.zeros(1, 1, TOKENS, 8, dtype=torch.bfloat16, requires_grad=True), inputs(torch.bfloat16)[1])
    _, value, _ = on_ranks(cross_entropy, given, {"cp": 2})
    assert float(value) == float(torch.tensor(8.0).log().bfloat16())


def test_ranks_of_tp_add_up_in_float32() -> None:
    def loss(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), t, reduction="sum")

    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 12, generator=generator).bfloat16().requires_grad_() for n in (TOKENS, 8))
    program, value, _ = on_ranks(loss, (h, w, torch.arange(TOKENS) % 8), {"tp": 2})  # type: ignore[arg-type]
    exact = loss(F.linear(h, w).float(), torch.eye(8), torch.arange(TOKENS) % 8)
    (partial,) = nodes_of(program, "spx.all_reduce")
    assert partial.meta["val"].dtype == torch.float32
    assert relative(value, exact.detach()) <= 2**-8


def test_wide_sums_and_products_of_matrices_stay() -> None:
    def model(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w).float().sum() + h.double().mean()

    given = (torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(8, 8).bfloat16())
    assert after_pass("widen-sums", model, given).history.snapshots[-1].report.rewrites == 0
