"""Autocast becomes casts in the graph: the captured graph gives, without autocast, what the plain function gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from example_numerics import as_list, copies, cotangents, leaves_of
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spcompile.capture import autocast
from spcompile.capture.retrace import capture
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
    "index_copy": (lambda a, b, i: a.index_copy(0, i, b), (x(4, 3), half(2, 3), labels(2))),
    "index_put": (lambda a, b, i: a.index_put((i,), b.to(a.dtype)), (x(4, 3), half(2, 3), labels(2))),
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
    "scatter_add": (lambda a, b, i: a.scatter_add(0, i, b.to(a.dtype)), (x(4, 3), half(2, 3), labels(2, 3))),
    "sdpa": (F.scaled_dot_product_attention, (x(2, 2, 8, 4), half(2, 2, 8, 4), x(2, 2, 8, 4))),
    "sdpa with a mask": (F.scaled_dot_product_attention, (*(half(2, 2, 8, 4) for _ in range(3)), x(8, 8).detach())),
    "softmax": (lambda h: h.softmax(-1), (half(3, 4),)),
    "softmax that is asked for": (lambda h: F.softmax(h, -1, dtype=torch.float32).to(h.dtype), (half(3, 4),)),
    "softplus": (F.softplus, (half(3, 4),)),
    "stack": (lambda a, b: torch.stack([a, b]), (half(3, 4), x(3, 4))),
    "sum": (lambda h: h.sum(1), (half(3, 4),)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (x(3, 4), x(4, 5))),
    "where": (lambda a, b: torch.where(a > 0, a, b), (half(3, 4), x(3, 4))),
}


def numbers(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, and gradients of what has some; backward runs without autocast, as it should."""
    given = copies(inputs)
    outputs = as_list(function(*given))
    return [*outputs, *torch.autograd.grad(outputs, leaves_of(given), cotangents(outputs))]


def check(function: Callable[..., Any], inputs: Sequence[Tensor], *, around: bool = False) -> fx.GraphModule:
    """The captured graph; without autocast it gives the very bits that the function gives."""

    def under(forward: Callable[..., Any], *given: Any) -> Any:
        with torch.autocast("cpu", HALF, enabled=around, cache_enabled=False):
            return forward(*given)

    def work(gm: fx.GraphModule, given: Sequence[Any]) -> fx.GraphModule:
        found = capture(gm, given)
        with torch.autocast("cpu", enabled=False):
            have, want = numbers(found, given), numbers(partial(under, gm.forward), given)
        for a, b in zip(have, want, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return found

    graph: fx.GraphModule = under(with_dynamo_graph, function, inputs, work)
    assert not [n for n in graph.graph.nodes if "autocast" in str(n.target)]
    return graph


@pytest.mark.thinned(10)
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


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_of_cuda_read_the_same_dtypes(name: str) -> None:
    function, inputs = CALLS[name]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda", requires_grad=t.requires_grad) for t in inputs]
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", HALF)
    try:
        with torch.no_grad(), mode, autocast.without_cache():
            graph = make_fx(lambda *a: function(*a), pre_dispatch=True)(*fakes)  # functional tensors need a real device
            with Kernels() as plain:
                want = function(*fakes)
        autocast.make_explicit(graph)
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.no_grad(), mode, Kernels() as ours:
        have = graph(*fakes)
    assert [t.dtype for t in as_list(have)] == [t.dtype for t in as_list(want)]
    assert ours.ran == plain.ran


def products(gm: fx.GraphModule) -> Counter[torch.dtype]:
    """The matrix products of a graph by dtype."""
    names = (aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default)
    return Counter(n.meta["val"].dtype for n in gm.graph.nodes if n.target in names)


def block(h: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.layer_norm(F.linear(h, w), (4,)), w) + h


def context(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", HALF, cache_enabled=False):
        return block(h, w).sum()


# A cache would sum the gradients of both uses of w in half precision.
@torch.autocast("cpu", HALF, cache_enabled=False)
def decorated(h: Tensor, w: Tensor) -> Tensor:
    return block(h, w)


def a_part(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(h, w)
    with torch.autocast("cpu", HALF):
        inside = F.linear(h, w)
    return inside, F.linear(inside.float(), w)


def nested(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast("cpu", HALF):
        h = F.linear(h, w)
        with torch.autocast("cpu", torch.float16):
            other = F.linear(h, w)
        return h, other, F.linear(other, w)


def off_inside(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", HALF):
        h = F.linear(h, w)
        with torch.autocast("cpu", enabled=False):
            exact = F.linear(h.float(), w)
        return exact, F.linear(exact, w)


def off_from_the_start(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", HALF, enabled=False):
        return block(h, w)


def of_another_device(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cuda", HALF):
        return block(h, w)


def checkpointed(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", HALF, cache_enabled=False):
        return checkpoint(block, checkpoint(decorated, h, w, use_reentrant=False), w, use_reentrant=False)


def without_gradient(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", HALF):
        with torch.no_grad():
            scale = F.linear(h, w).abs().amax()
        return F.linear(h, w) / scale


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.matmul(h, 2 * torch.eye(4))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def own_gradient(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", HALF):
        return Doubled.apply(F.linear(h, w).float())


def vmapped(h: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", HALF, cache_enabled=False):
        return torch.vmap(lambda row: F.mse_loss(torch.mv(w, row), row))(h)


FORMS: dict[Callable[..., Any], dict[torch.dtype, int]] = {
    context: {HALF: 2},
    decorated: {HALF: 2},
    a_part: {torch.float32: 2, HALF: 1},
    nested: {HALF: 2, torch.float16: 1},
    off_inside: {HALF: 2, torch.float32: 1},
    off_from_the_start: {torch.float32: 2},
    of_another_device: {torch.float32: 2},
    checkpointed: {HALF: 4},
    without_gradient: {HALF: 2},
    own_gradient: {HALF: 2},
    vmapped: {},
}


@pytest.mark.thinned(5)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_forms_of_autocast(form: Callable[..., Any]) -> None:
    assert products(check(form, (x(3, 4), x(4, 4)))) == FORMS[form]


def test_autocast_around_the_call() -> None:
    assert products(check(block, (x(3, 4), x(4, 4)), around=True)) == {HALF: 2}
    assert products(check(off_inside, (x(3, 4), x(4, 4)), around=True)) == {HALF: 2, torch.float32: 1}
    assert products(check(off_from_the_start, (x(3, 4), x(4, 4)), around=True)) == {torch.float32: 2}


@pytest.mark.thinned(3)
def test_flex_attention_casts_its_operands() -> None:
    """And nothing inside: scores stay in the precision that the call itself has."""

    def model(h: Tensor) -> Tensor:
        with torch.autocast("cpu", HALF):
            return flex_attention(h, h, h)

    def work(gm: fx.GraphModule, given: Sequence[Any]) -> Tensor:
        found = capture(gm, given)
        assert products(found) == {HALF: 2}
        return as_list(found(*given))[0]

    h = x(1, 2, 16, 4).detach()
    found = with_dynamo_graph(model, (h,), work)
    wanted = F.scaled_dot_product_attention(h.to(HALF), h.to(HALF), h.to(HALF))
    assert found.dtype == HALF
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)


def test_a_capture_leaves_autocast_as_it_was() -> None:
    def failing(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        for node in gm.graph.find_nodes(op="call_function", target=autocast.EXIT):
            node.target = _fails
        with pytest.raises(ZeroDivisionError):
            capture(gm, given)
        for node in gm.graph.find_nodes(op="call_function", target=_fails):
            node.target = autocast.EXIT

    with_dynamo_graph(context, (x(3, 4), x(4, 4)), failing)
    assert not autocast.is_on()
    assert torch.is_autocast_cache_enabled()


def _fails(switch: Any) -> None:
    raise ZeroDivisionError
