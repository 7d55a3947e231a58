"""Models that differentiate inside of a forward: torch.func is written out, and its gradients have gradients.

B batch, S sequence, D width, C steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap

import spcompile
from spcompile.diagnostics import CaptureFailed

WIDTH, CHUNK = 8, 4


class Inner(nn.Module):
    """Projections around something that takes gradients of its own, behind an attention."""

    def __init__(self, learn: Callable[[Inner, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.memory, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.norm, self.rate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)
        self.learn = learn

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + F.scaled_dot_product_attention(self.q(x_BSD), self.k(x_BSD), self.v(x_BSD), is_causal=True)
        return self.out(self.learn(self, x_BSD)) + x_BSD


def weights_of_each_sequence(model: Inner, x_BSD: Tensor) -> Tensor:
    """One step of a fast weight for each sequence, through a norm."""

    def error(weight: Tensor, k_SD: Tensor, v_SD: Tensor) -> Tensor:
        return (model.norm(F.linear(k_SD, weight)) - v_SD).square().mean()

    weight = model.memory.weight
    steps = vmap(grad(error), in_dims=(None, 0, 0))(weight, model.k(x_BSD), model.v(x_BSD))
    return torch.einsum("bsd,bed->bse", model.q(x_BSD), weight - 0.1 * steps)


def memory_of_chunks(model: Inner, x_BSD: Tensor) -> Tensor:
    """A memory that learns by its gradient in each chunk, and is read in the next one."""

    def error(weight: Tensor, k_CD: Tensor, v_CD: Tensor, rate_C: Tensor) -> Tensor:
        return ((F.silu(k_CD @ weight) - v_CD).square().mean(-1) * rate_C).sum()

    length = x_BSD.shape[1]
    x = F.pad(x_BSD, (0, 0, 0, -length % CHUNK)).unflatten(1, (-1, CHUNK))
    of_chunk = vmap(grad(error), in_dims=(None, 0, 0, 0))
    weight = model.memory.weight
    steps = vmap(of_chunk, in_dims=(None, 0, 0, 0))(weight, model.k(x), model.v(x), model.rate(x)[..., 0].sigmoid())
    after = weight - steps.cumsum(1)
    before = torch.cat([weight.expand(len(x), 1, -1, -1), after[:, :-1]], 1)
    return F.silu(model.q(x) @ before).flatten(1, 2)[:, :length]


def of_the_whole_batch(model: Inner, x_BSD: Tensor) -> Tensor:
    step, error = grad_and_value(lambda weight: F.linear(x_BSD, weight).softmax(-1).square().mean())(
        model.memory.weight
    )
    return F.linear(x_BSD, model.memory.weight - step) * error


def of_a_module(model: Inner, x_BSD: Tensor) -> Tensor:
    held = dict(model.memory.named_parameters())

    def error(parameters: dict[str, Tensor], k_SD: Tensor, v_SD: Tensor) -> Tensor:
        return F.smooth_l1_loss(F.gelu(functional_call(model.memory, parameters, (k_SD,))), v_SD)

    steps = vmap(grad(error), in_dims=(None, 0, 0))(held, model.k(x_BSD), model.v(x_BSD))
    return torch.einsum("bsd,bed->bse", x_BSD, held["weight"] - steps["weight"]) + steps["bias"][:, None]


def products_with_a_jacobian(model: Inner, x_BSD: Tensor) -> Tensor:
    value, pull_back = vjp(lambda x: F.gelu(model.memory(x)), x_BSD)
    slopes = vmap(vmap(jacrev(lambda x_D: torch.tanh(model.memory(x_D)))))(x_BSD)
    return value + pull_back(value)[0] + (slopes @ x_BSD[..., None])[..., 0]


def under_no_grad(model: Inner, x_BSD: Tensor) -> Tensor:
    """A scale of each sequence that has no gradient, and a step that sees another."""

    def scaled(x_SD: Tensor) -> Tensor:
        with torch.no_grad():
            scale_S = x_SD.norm(dim=-1).exp()
        return x_SD / scale_S[:, None]

    def error(weight: Tensor, x_SD: Tensor) -> Tensor:
        with torch.no_grad():
            aim_SD = F.linear(x_SD, weight).tanh()
        return ((F.linear(x_SD, weight) - 2 * aim_SD) ** 2).mean()

    steps = vmap(grad(error), in_dims=(None, 0))(model.memory.weight, x_BSD)
    return torch.einsum("bsd,bed->bse", vmap(scaled)(x_BSD), model.memory.weight - steps)


LEARNED = [
    under_no_grad,
    weights_of_each_sequence,
    memory_of_chunks,
    of_the_whole_batch,
    of_a_module,
    products_with_a_jacobian,
]


@pytest.mark.parametrize("learn", LEARNED, ids=lambda learn: learn.__name__)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"dp": 2}], ids=str)
@pytest.mark.thinned(12)
def test_every_gradient_is_that_of_the_plain_model(
    learn: Callable[[Inner, Tensor], Tensor], mesh: dict[str, int]
) -> None:
    torch.manual_seed(0)
    report = spcompile.verify(Inner(learn).double(), (torch.randn(2, 14, WIDTH).double(),), mesh)
    assert report.ok, report


def test_forward_mode_is_refused() -> None:
    def learn(model: Inner, x_BSD: Tensor) -> Tensor:
        value, change = jvp(model.memory, (x_BSD,), (x_BSD,))
        return value * change

    with pytest.raises(CaptureFailed, match=r"torch\.func\.jvp") as caught:
        spcompile.explain(Inner(learn), (torch.randn(2, 8, WIDTH),), {"cp": 2})
    assert "test_func_transforms.py" in str(caught.value)
