"""recognize-softmax: every spelling with exp and sum, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from example_numerics import after_pass, assert_equal, nodes_of, on_one_device
from torch import Tensor


def shifted(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.max(dim, keepdim=True)[0]


def divided(e: Tensor, dim: int = -1) -> Tensor:
    return e / e.sum(dim, keepdim=True)


SPELLINGS = {
    "plain": (lambda x: divided(x.exp()), "aten.softmax"),
    "shifted": (lambda x: divided(shifted(x).exp()), "aten.softmax"),
    "amax, detached": (lambda x: divided((x - x.amax(-1, True).detach()).exp()), "aten.softmax"),
    "another dim": (lambda x: divided(shifted(x, 1).exp(), 1), "aten.softmax"),
    "a dim put back": (lambda x: x.exp() / x.exp().sum(1).unsqueeze(1), None),  # exp is computed twice
    "one exp, a dim put back": (lambda x: (lambda e: e / e.sum(1).unsqueeze(1))(x.exp()), "aten.softmax"),
    "logarithm of a sum": (lambda x: x - x.exp().sum(-1, keepdim=True).log(), "aten.log_softmax"),
    "logarithm, shifted": (lambda x: (lambda y: y - y.exp().sum(-1, True).log())(shifted(x)), "aten.log_softmax"),
    "logarithm, dim put back": (lambda x: x - x.exp().sum(-1).log().unsqueeze(-1), "aten.log_softmax"),
    "dim put back, logarithm": (lambda x: x - x.exp().sum(-1).unsqueeze(-1).log(), "aten.log_softmax"),
    "logsumexp": (lambda x: x - x.logsumexp(-1, keepdim=True), "aten.log_softmax"),
    "logsumexp, dim put back": (lambda x: x - torch.logsumexp(x, 2)[..., None], "aten.log_softmax"),
    "an epsilon": (lambda x: (lambda e: e / (e.sum(-1, True) + 1e-3))(x.exp()), None),
    "two dims": (lambda x: (lambda e: e / e.sum((-1, -2), True))(x.exp()), None),
    "dim lost": (lambda x: (lambda y: y - y.logsumexp(-1))(x[0, :, :4]), None),
    "another dim put back": (lambda x: (lambda y: y - y.logsumexp(-1).unsqueeze(0))(x[0, :, :4]), None),
    "of something else": (lambda x: x.exp() / (x + 1).exp().sum(-1, True), None),
    "in another dtype": (lambda x: (lambda e: e / e.sum(-1, True, dtype=torch.float32))(x.exp()), None),
    "scaled": (lambda x: torch.sub(x, x.logsumexp(-1, True), alpha=2), None),
    "no exponentials": (lambda x: x / x.sum(-1, True), None),
    "two logarithms": (lambda x: x - x.exp().sum(-1, True).log().log(), None),
    "logarithm of a logsumexp": (lambda x: x - x.exp().logsumexp(-1, True).log(), None),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, expected = SPELLINGS[name]
    inputs = [torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)]
    program = after_pass("recognize-softmax", function, inputs)
    softmaxes = [n for op in ("aten.softmax", "aten.log_softmax") for n in nodes_of(program, op)]
    assert len(softmaxes) == (expected is not None)
    assert expected is None or nodes_of(program, expected)
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(function, inputs))


def test_exponentials_that_something_else_reads_stay() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        e = x.exp()
        return e / e.sum(-1, keepdim=True), e

    inputs = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True)]
    program = after_pass("recognize-softmax", function, inputs)
    assert len(nodes_of(program, "aten.exp")) == len(nodes_of(program, "aten.softmax")) == 1
    assert_equal(on_one_device(program.gm, program.inputs), on_one_device(function, inputs))
