"""Writes that autograd does not see change numbers alone: every gradient goes where it went before.

B batch, S sequence, D width.
"""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from around_attention import WIDTH, AroundAttention, Lines
from torch import Tensor, nn

import spcompile
from spcompile.capture.quiet_writes import settle_kept_gradients

LENGTH = 6
FORMS: dict[str, Lines] = {}


def form(written: Lines) -> Lines:
    FORMS[written.__name__] = written
    return written


@form
def a_weight(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    with torch.no_grad():
        inner.weight.div_(inner.weight.norm(dim=1, keepdim=True))
    return inner(x_BSD)


@form
def rows_of_a_weight(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    with torch.no_grad():
        inner.weight[0].mul_(2.0)
        inner.weight[1:3] = 0.25
    return inner(x_BSD)


@form
def a_weight_through_data(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    inner.weight.data.clamp_(-0.2, 0.2)
    return inner(x_BSD)


@form
def between_two_readers(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    before = inner(x_BSD)
    with torch.no_grad():
        inner.bias.add_(1.0)
    return before * inner(x_BSD)


@form
def a_result(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    with torch.no_grad():
        y_BSD *= 2.0
        y_BSD.add_(y_BSD.mean(-1, keepdim=True))
    return y_BSD


@form
def part_of_a_result(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    with torch.no_grad():
        first, second = y_BSD.chunk(2, -1)
        first.mul_(3.0)
        second[..., 0] = 0.5
    return y_BSD


@form
def seen_through_another_view(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    heads = y_BSD.unflatten(-1, (2, -1))
    with torch.no_grad():
        y_BSD.masked_fill_(y_BSD > 0.2, 0.1)
        largest = heads.amax(-1, keepdim=True)
    return (heads * largest).flatten(2)


@form
def an_alias_renewed_without_gradients(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    heads = y_BSD.unflatten(-1, (2, -1))
    y_BSD.mul_(2.0)
    with torch.no_grad():
        largest = heads.amax(-1, keepdim=True)
    return (heads * largest).flatten(2)


@form
def through_detach(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    alias = y_BSD.detach()[..., 1:4]
    alias.clamp_(min=0.1)
    y_BSD.data[:, 0] = 1.0
    return y_BSD + alias.sum(-1, keepdim=True)


@form
def an_alias_with_a_gradient_of_its_own(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    alias = y_BSD.detach()
    alias.add_(inner.bias)
    return y_BSD * alias


@form
def infinities(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    with torch.no_grad():
        y_BSD[..., 2:5] = -torch.inf
        y_BSD.mul_(2.0)
    return y_BSD.softmax(-1)


@form
def into_what_needs_none(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    copy = torch.zeros_like(y_BSD)
    with torch.no_grad():
        copy.copy_(y_BSD)
    return y_BSD * copy


@form
def an_argument_named_out(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD = inner(x_BSD)
    with torch.no_grad():
        torch.mul(y_BSD, 2.0, out=y_BSD)
        F.relu(y_BSD, inplace=True)
    return y_BSD


@form
def beside_a_branch(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    y_BSD: Tensor = torch.cond(x_BSD.sum() > 0, lambda x: inner(x), lambda x: inner(x) * 2, (x_BSD,))
    return y_BSD


@form
def complex_numbers(inner: nn.Linear, x_BSD: Tensor) -> Tensor:
    waves = torch.fft.rfft(inner(x_BSD), dim=-1)
    with torch.no_grad():
        waves.mul_(2.0)
        scale = torch.fft.rfft(inner(x_BSD).tanh(), dim=-1)
    return torch.fft.irfft(waves * scale, n=WIDTH, dim=-1)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"dp": 2}], ids="-".join)
@pytest.mark.thinned(6)
def test_every_gradient_is_that_of_the_plain_model(name: str, mesh: dict[str, int]) -> None:
    torch.manual_seed(0)
    report = spcompile.verify(AroundAttention(FORMS[name]).double(), (torch.randn(2, LENGTH, WIDTH).double(),), mesh)
    assert report.ok, report


def test_what_has_no_gradient_is_its_new_numbers() -> None:
    graph = fx.Graph()
    weight, table, new = (graph.placeholder(name) for name in ("weight", "table", "new"))
    weight.meta["trainable"] = True
    keep = torch.ops.spx.keep_gradient.default
    kept, plain = (graph.call_function(keep, (old, new)) for old in (weight, table))
    graph.output((kept, plain, graph.call_function(keep, (kept, new))))
    settle_kept_gradients(graph)
    assert [node.name for node in graph.nodes if node.op == "call_function"] == [
        *("detach_default", "keep_gradient_default"),
        "detach_default_1",
        *("detach_default_2", "keep_gradient_default_2"),
    ]
    values = torch.ones(2, requires_grad=True), torch.ones(2), torch.full((2,), 3.0)
    first, second, third = fx.Interpreter(fx.GraphModule({}, graph)).run(*values)
    assert [float(value[0]) for value in (first, second, third)] == [3.0, 3.0, 3.0]
    assert not second.requires_grad
    (gradient,) = torch.autograd.grad(third.sum(), values[0])
    assert gradient.tolist() == [1.0, 1.0]
