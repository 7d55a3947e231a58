"""Dropout inside checkpointed regions is drawn twice from one state, and in the order of the model's calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from worker_pool import WorkerPool

import spcompile

WIDTH = 16


class MLP(nn.Module):
    """What `down` multiplies has gone through a dropout: for the gradient of its weight it is drawn again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.dropout(torch.relu(self.up(x_BSD)), 0.25))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        for layer in self.layers:
            q_BNSH = x_BSD.unflatten(-1, (4, -1)).transpose(1, 2)
            x_BSD = x_BSD + F.scaled_dot_product_attention(q_BNSH, q_BNSH, q_BNSH).transpose(1, 2).flatten(2)
            x_BSD = F.dropout(x_BSD + checkpoint(layer, x_BSD, use_reentrant=False), 0.1)
        return x_BSD.square().mean()


def given() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return TwoLayers().double(), {"x_BSD": torch.randn(2, 8, WIDTH, dtype=torch.float64)}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}])
def test_loss_and_gradients_are_those_of_one_device(mesh: dict[str, int]) -> None:
    report = spcompile.verify(*given(), mesh=mesh, tolerance=1e-10)
    assert report.ok, str(report)


@pytest.mark.thinned(5)
def test_of_a_region_its_input_is_kept_and_the_state_of_each_draw() -> None:
    """Also where what it computes changes layout on the way: the mask is cut, products are summed over tp."""
    plan = spcompile.explain(*given(), {"tp": 2})
    assert plan.graph("forward").count("run_and_save_rng_state(") == 2
    assert plan.graph("backward").count("run_with_rng_state(") == 2
    shards = [2, 8 // 2, WIDTH]
    kept = plan.graph("forward").rpartition("return")[2]
    assert "reduce_scatter" not in kept
    assert "ones" not in kept
    assert plan.memory.saved_activation_bytes < 8 * 8 * math.prod(shards) + 2 * 6000


def on_a_rank(compiler: str) -> float:
    """The largest error of the loss and of all gradients, from equal states of the generator."""
    plain, inputs = given()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="spcompile", options={"mesh": {"tp": 2}, "compiler": compiler})
    errors = []
    for model in (plain, compiled):
        torch.manual_seed(1)
        loss = model(**inputs)
        loss.backward()
        errors.append(loss.detach())
    gradients = [(p.grad - q.grad).abs().max() for p, q in zip(plain.parameters(), compiled.parameters(), strict=True)]
    return float(torch.stack([(errors[0] - errors[1]).abs(), *gradients]).max())


def slope_off(compiler: str) -> float:
    """By how much the gradient along a direction differs from the slope of the loss, each step from the same state."""
    model, inputs = given()
    model.compile(backend="spcompile", options={"mesh": {"tp": 2}, "compiler": compiler})
    directions = [torch.randn_like(p) for p in model.parameters()]

    def loss_at(distance: float) -> Tensor:
        for p, direction in zip(model.parameters(), directions, strict=True):
            p.data += distance * direction
        torch.manual_seed(1)
        return model(**inputs)

    loss_at(0.0).backward()
    predicted = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    step = 1e-5
    slope = (loss_at(step) - loss_at(-2 * step)) / (2 * step)
    return float((slope / predicted - 1).detach().abs())


@pytest.mark.thinned(9)
@pytest.mark.slow
def test_inductor_draws_the_same_in_the_backward(worker_pool: Callable[[int], WorkerPool]) -> None:
    """Its numbers are not those of eager PyTorch."""
    assert max(worker_pool(2).run(slope_off, "inductor")) < 1e-6


@pytest.mark.thinned(6)
def test_on_real_processes(worker_pool: Callable[[int], WorkerPool]) -> None:
    assert max(worker_pool(2).run(on_a_rank, "eager")) < 1e-10
