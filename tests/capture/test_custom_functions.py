"""torch.autograd.Function: its parts are sharded, and its gradient stays the one that it defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from own_gradients import Gradients, InChunks, OwnGate, OwnLinear, OwnLoss, OwnModel, OwnNorm
from torch import Tensor

import spcompile
from spcompile.capture.retrace import capture
from spcompile.diagnostics import CaptureFailed


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Transposed(torch.autograd.Function):
    """Its gradient mixes positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.flip(0)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


class Adds(torch.autograd.Function):
    """Gives its inputs gradients whatever comes, and to the last nothing else, in one dim more than it has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x * other

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        (other,) = ctx.saved_tensors
        return 2 * grad + other, (grad + 1).cumsum(0) * other, torch.full((2, *other.shape), 5.0)


class AddsToTwo(torch.autograd.Function):
    """Of two results, either of which may be read alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1, x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> Tensor:
        return grad + other + 1


def labels() -> Tensor:
    return torch.tensor([[1, 2, 0, 1], [3, 3, 1, 0]])


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda x, w, b: OwnLinear.apply(x.sin(), w, b).cos(), ((2, 3, 4), (5, 4), (5,))),
    "norm": (lambda x, w: OwnNorm.apply(x * 2, w).sin(), ((2, 3, 4), (4,))),
    "gate": (lambda a, b: OwnGate.apply(a, b.exp())[0].sin() + OwnGate.apply(b, a)[1][..., None], ((2, 3), (2, 3))),
    "chunks": (lambda x, w: InChunks.apply(x.sin(), w).cos(), ((2, 4, 4), (4, 5))),
    "loss": (lambda x: OwnLoss.apply(x.sin(), labels()) * 2, ((2, 4, 4),)),
    "positions": (lambda x: Transposed.apply(x * 3).square(), ((5, 2),)),
    "adds": (lambda x, y, z: Adds.apply(x.sin(), y.exp(), z * 3).cos(), ((5, 2), (5, 2), (5, 2))),
    "inside of a checkpoint": (
        lambda x, w: torch.utils.checkpoint.checkpoint(lambda y: OwnNorm.apply(y, w).sin(), x, use_reentrant=False),
        ((2, 3, 4), (4,)),
    ),
    "under autocast": (lambda x, w: _under_autocast(x, w), ((2, 3, 4), (4, 4))),
}


def _under_autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x.float() @ w.float()
        return OwnGate.apply(y, y * 2)[0].double().sin()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_keeps_its_own_gradient(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def compiled_by(gm: Any, examples: list[Any]) -> Any:
        return capture(gm, examples).forward

    expected = torch.autograd.grad(function(*inputs).sum(), inputs)
    found = torch.autograd.grad(torch.compile(function, backend=compiled_by, fullgraph=True)(*inputs).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "function",
    [lambda x, y: Clipped.apply(x) + y.sum(), lambda x, y: AddsToTwo.apply(x)[0] + y.sum()],
    ids=["clips", "adds to two"],
)
def test_a_gradient_that_is_not_linear_is_refused(function: Callable[..., Tensor]) -> None:
    def compiled_by(gm: Any, examples: list[Any]) -> Any:
        with pytest.raises(CaptureFailed, match=r"torch\.autograd\.Function"):
            capture(gm, examples)
        return gm.forward

    torch.compile(function, backend=compiled_by)(torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))


@pytest.mark.thinned(10)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"cp": 3}, {"dp": 2}, {"tp": 2, "cp": 2}], ids=str)
def test_a_model_of_them_runs_on_shards(mesh: dict[str, int]) -> None:
    """What gives the gradient costs the forward nothing: it saves its share, and computes no product more."""
    model, ids = OwnModel(layers=1), torch.randint(0, 29, (4, 47))
    inputs = {"ids_BS": ids, "labels_BS": ids.roll(-1, 1)}
    report = spcompile.verify(model, inputs, mesh)
    assert report.ok, str(report)
    torch._dynamo.reset()
    plan = spcompile.explain(model, inputs, mesh)
    memory, ranks = plan.memory, plan.answers.world
    assert int(memory.saved_activation_bytes) * ranks <= 1.15 * int(memory.saved_activation_bytes_one_device)
    products = 7 + 1  # of a block and the head
    assert plan.graphs["forward"].count("aten.mm(") + plan.graphs["forward"].count("aten.addmm(") == products


@pytest.mark.thinned(30)
def test_lengths_may_be_symbols() -> None:
    ids = torch.randint(0, 29, (2, 24))
    torch._dynamo.mark_dynamic(ids, 1)
    plan = spcompile.explain(OwnModel(layers=1), {"ids_BS": ids, "labels_BS": ids}, {"cp": 2})
    assert len(plan.symbols) == 1
    assert plan.memory.saved_activation_bytes.free_symbols
