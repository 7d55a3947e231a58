"""Autocast becomes casts in the graph: the captured graph gives, without autocast, what the plain function gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from example_numerics import as_list, copies, cotangents, leaves_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spcompile.capture import autocast
from spcompile.capture.capture import capture
from spcompile.report.example_runs import with_dynamo_graph

aten = torch.ops.aten
HALF = torch.bfloat16


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def half(*shape: int) -> Tensor:
    return x(*shape, dtype=HALF)


def labels(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 4


# Operands as they come about under autocast: parameters in float32, activations in half precision.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "addbmm": (torch.addbmm, (x(3, 5), half(2, 3, 4), x(2, 4, 5))),
    "addmm": (torch.addmm, (x(5), half(3, 4), x(4, 5))),
    "baddbmm": (torch.baddbmm, (x(2, 3, 5), half(2, 3, 4), x(2, 4, 5))),
    "batch_norm": (lambda h, w, b: F.batch_norm(h, None, None, w, b, training=True), (half(4, 5), x(5), x(5))),
    "bilinear": (F.bilinear, (half(3, 4), x(3, 5), x(6, 4, 5))),
    "bmm": (torch.bmm, (half(2, 3, 4), x(2, 4, 5))),
    "cat": (lambda a, b: torch.cat([a, b], 1), (half(3, 4), x(3, 2))),
    "conv1d": (F.conv1d, (half(2, 4, 8), x(6, 4, 3), x(6))),
    "cosine_similarity": (F.cosine_similarity, (half(3, 4), x(3, 4))),
    "cross_entropy": (F.cross_entropy, (half(6, 4), labels(6))),
    "cross_entropy of both": (lambda h, w, t: F.cross_entropy(F.linear(h, w), t), (x(6, 8), x(4, 8), labels(6))),
    "cumsum": (lambda h: h.cumsum(1), (half(3, 4),)),
    "dropout": (lambda h, w: F.dropout(F.linear(h, w), 0.0), (x(3, 4), x(5, 4))),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (x(2, 3, 4), half(2, 5, 4))),
    "exp": (torch.exp, (half(3, 4),)),
    "gelu": (F.gelu, (half(3, 4),)),
    "group_norm": (lambda h, w, b: F.group_norm(h, 2, w, b), (half(3, 4, 5), x(4), x(4))),
    "huber_loss": (F.huber_loss, (half(3, 4), x(3, 4))),
    "index_copy": (lambda a, b: a.index_copy(0, labels(2), b), (x(4, 3), half(2, 3))),
    "index_put": (lambda a, b: a.index_put((labels(2),), b.to(a.dtype)), (x(4, 3), half(2, 3))),
    "kl_div": (F.kl_div, (half(3, 4), x(3, 4))),
    "layer_norm": (lambda h, w, b: F.layer_norm(h, (4,), w, b), (half(3, 4), x(4), x(4))),
    "linalg_vector_norm": (torch.linalg.vector_norm, (half(3, 4),)),
    "linear": (F.linear, (half(3, 4), x(5, 4), x(5))),
    "linear of float64": (F.linear, (x(3, 4, dtype=torch.float64), x(5, 4, dtype=torch.float64))),
    "log_softmax": (lambda h: F.log_softmax(h, -1), (half(3, 4),)),
    "logsumexp": (lambda h: h.logsumexp(-1), (half(3, 4),)),
    "matmul": (torch.matmul, (x(3, 4), half(4, 5))),
    "max with indices": (lambda h, w: torch.max(F.linear(h, w), 1)[0], (x(3, 4), x(5, 4))),
    "mean": (lambda h: h.mean(-1), (half(3, 4),)),
    "mse_loss": (F.mse_loss, (half(3, 4), x(3, 4))),
    "nll_loss": (lambda h, t: F.nll_loss(F.log_softmax(h, -1), t), (half(6, 4), labels(6))),
    "norm": (lambda h: torch.norm(h, 2), (half(3, 4),)),
    "pad by reflection": (lambda h: F.pad(h, (1, 1), mode="reflect"), (half(2, 3, 4),)),
    "pow": (lambda h: h.abs().pow(1.5), (half(3, 4),)),
    "prelu": (F.prelu, (x(3, 4), x(1))),
    "prod": (lambda h: h.prod(1), (half(3, 4),)),
    "quantile": (lambda h: torch.quantile(h.float(), 0.5), (half(3, 4),)),
    "rms_norm": (lambda h, w: F.rms_norm(h, (4,), w), (x(3, 4), x(4))),
    "scatter_add": (lambda a, b: a.scatter_add(0, labels(2, 3), b.to(a.dtype)), (x(4, 3), half(2, 3))),
    "sdpa": (F.scaled_dot_product_attention, (x(2, 2, 8, 4), half(2, 2, 8, 4), x(2, 2, 8, 4))),
    "sdpa with a mask": (F.scaled_dot_product_attention, (*(half(2, 2, 8, 4) for _ in range(3)), x(8, 8).detach())),
    "softmax": (lambda h: h.softmax(-1), (half(3, 4),)),
    "softmax that is asked for": (lambda h: F.softmax(h, -1, dtype=torch.float32).to(h.dtype), (half(3, 4),)),
    "softplus": (F.softplus, (half(3, 4),)),
    "stack": (lambda a, b: torch.stack([a, b]), (half(3, 4), x(3, 4))),
    "sum": (lambda h: h.sum(1), (half(3, 4),)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (half(3, 4), x(4, 5))),
    "where": (lambda a, b: torch.where(a > 0, a, b), (half(3, 4), x(3, 4))),
}


def numbers(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, and gradients of what has some; backward runs without autocast, as it should."""
    given = copies(inputs)
    outputs = as_list(function(*given))
    return [*outputs, *torch.autograd.grad(outputs, leaves_of(given), cotangents(outputs))]


def check(function: Callable[..., Any], inputs: Sequence[Tensor], *, around: bool = False) -> fx.GraphModule:
    """The captured graph; without autocast it gives the very bits that the function gives."""

    def work(gm: fx.GraphModule, given: Sequence[Any]) -> fx.GraphModule:
        found = capture(gm, given)
        with torch.autocast("cpu", enabled=False):
            have = numbers(found, given)
        for a, b in zip(have, numbers_inside(gm.forward, given), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return found

    def numbers_inside(forward: Callable[..., Any], given: Sequence[Any]) -> list[Tensor]:
        return numbers(lambda *a: under(forward, *a), given) if around else numbers(forward, given)

    def under(forward: Callable[..., Any], *given: Any) -> Any:
        with torch.autocast("cpu", HALF, cache_enabled=False):
            return forward(*given)

    def outer(*given: Any) -> Any:
        with torch.autocast("cpu", HALF, enabled=around, cache_enabled=False):
            return with_dynamo_graph(function, inputs, work)

    graph: fx.GraphModule = outer()
    assert not [n for n in graph.graph.nodes if "autocast" in str(n.target)]
    return graph


@pytest.mark.parametrize("name", CALLS)
def test_calls_compute_what_they_do_under_autocast(name: str) -> None:
    function, inputs = CALLS[name]

    def inside(*given: Tensor) -> Any:
        with torch.autocast("cpu", HALF):
            return function(*given)

    check(inside, inputs)


class Kernels(TorchDispatchMode):
    """Counts kernels with the dtypes that they read, but for casts."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [a.dtype for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if isinstance(result, Tensor) and torch.Tag.view_copy not in func.tags and func is not aten._to_copy.default:
            self.ran[f"{func} {read} -> {result.dtype}"] += 1
        return result


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_of_cuda_read_the_same_dtypes(name: str) -> None:
    function, inputs = CALLS[name]
    if name in ("quantile", "cosine_similarity", "index_copy"):
        pytest.skip("copies an index to the device, of which there is none here")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda", requires_grad=t.requires_grad) for t in inputs]
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", HALF)
    try:
        graph = capture(fx.symbolic_trace(lambda *a: function(*a), concrete_args=None) if False else _module(function, len(fakes)), fakes)
        with torch.no_grad(), mode, autocast.without_cache(), Kernels() as plain:
            want = function(*fakes)
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.no_grad(), mode, Kernels() as ours:
        have = graph(*fakes)
    assert [t.dtype for t in as_list(have)] == [t.dtype for t in as_list(want)]
    assert ours.ran == plain.ran


def _module(function: Callable[..., Any], arity: int) -> fx.GraphModule:
    """A graph of one call of `function`, as Dynamo makes it where it may not look inside."""
    graph = fx.Graph()
    given = [graph.placeholder(f"a{i}") for i in range(arity)]
    graph.output((graph.call_function(function, tuple(given)),))
    return fx.GraphModule(nn.Module(), graph)
