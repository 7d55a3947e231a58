"""The spx attention ops as PyTorch sees them: schema, fakes, autograd, dynamic shapes, strides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from spcompile.attention.op import attention, ring_attention
from spcompile.diagnostics import IllegalOption, RanksDisagree


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """The name of a process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield str(dist.group.WORLD.group_name)
    dist.destroy_process_group()


def inputs(S: int = 6, T: int = 6, V: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, n, s, d, dtype=dtype, requires_grad=True) for n, s, d in ((4, S, 4), (2, T, 4), (2, T, V))]


def local_calls() -> dict[str, tuple[Any, ...]]:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]])
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 1, 0, 2, 5, 4], dtype=torch.int32)
    nothing = (None, None, None, None, None, None)
    return {
        "causal": (*inputs(), *nothing, "causal", 0.5),
        "v head size": (*inputs(6, 8, 3), *nothing, "full", 0.5),
        "data": (*inputs(), None, None, documents, documents, documents > 0, None, "causal documents key_padding", 0.5),
        "bias": (*inputs(), None, None, None, None, None, bias, "causal", 0.5),
        "bool bias": (*inputs(), None, None, None, None, None, bias.detach() > 0, "causal", 0.5),
        "positions": (*inputs(), order, order.flip(0), None, None, None, None, "causal", 0.5),
        "bfloat16": (*inputs(dtype=torch.bfloat16), *nothing, "causal", 0.5),
    }


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name", local_calls())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(attention, local_calls()[name])


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", local_calls())
def test_opcheck_backward(name: str) -> None:
    arguments = local_calls()[name]
    out, lse = attention(*arguments)
    for grad_lse in (None, torch.randn_like(lse)):
        call = (torch.randn_like(out), grad_lse, out, lse, *arguments, True)
        call = tuple(x.detach() if isinstance(x, Tensor) else x for x in call)
        torch.library.opcheck(torch.ops.spx.attention_backward.default, call)


@pytest.mark.thinned(4)
def test_opcheck_ring(alone: str) -> None:
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    for order in ("contiguous", "zigzag"):
        arguments = (*inputs(), None, None, None, bias, "causal", 0.5, 6, 6, alone, 1, order)
        torch.library.opcheck(ring_attention, arguments)
        out, lse = ring_attention(*arguments)
        call = (torch.randn_like(out), None, out, lse, *arguments, True)
        call = tuple(x.detach() if isinstance(x, Tensor) else x for x in call)
        torch.library.opcheck(torch.ops.spx.ring_attention_backward.default, call)


def test_ring_of_another_size_is_refused(alone: str) -> None:
    with pytest.raises(RanksDisagree):
        ring_attention(*inputs(), None, None, None, None, "causal", 0.5, 12, 12, alone, 2, "contiguous")


def test_mask_and_data_must_agree() -> None:
    nothing = (None, None, None, None, None, None)
    with pytest.raises(IllegalOption):
        attention(*inputs(), *nothing, "causal documents", 0.5)
    with pytest.raises(IllegalOption):
        attention(*inputs(), *nothing[:4], torch.ones(1, 6, dtype=torch.bool), None, "causal", 0.5)


def test_memory_order_of_results_for_any_strides() -> None:
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs())
    nothing = (None, None, None, None, None, None)
    out, lse = attention(q, k, v, *nothing, "causal", 0.5)
    grads = torch.ops.spx.attention_backward(
        torch.ones_like(out).transpose(1, 2).contiguous().transpose(1, 2), None, out, lse, q, k, v, *nothing,
        "causal", 0.5, False,
    )  # fmt: skip
    assert all(x.is_contiguous() for x in (out.transpose(1, 2), lse, *grads))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    # A gradient without strides, as sum() makes it, and head dims that are not dense in memory.
    transposed = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(attention(*transposed, *nothing, "causal", 0.5)[0].sum(), transposed)
    expected = torch.autograd.grad(plain.sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.thinned(2)
def test_compiled_module_gradients() -> None:
    """Through AOTAutograd: forward and backward graphs, one compile for all lengths."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, None, None, None, None, None, None, "causal", 0.5)[0].square().sum()

    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=backend), fullgraph=True, dynamic=True)
    for length in (6, 9, 12):
        arguments = inputs(length, length)
        expected = torch.autograd.grad(loss(*arguments), arguments)
        for a, b in zip(torch.autograd.grad(compiled(*arguments), arguments), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 2


def test_second_derivative_is_refused() -> None:
    q, k, v = inputs()
    out, _ = attention(q, k, v, None, None, None, None, None, None, "causal", 0.5)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError):
        grad.sum().backward()
