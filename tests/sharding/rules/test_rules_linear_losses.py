"""The rule of spx.linear_cross_entropy: its text, and what it says on shards of rows and of classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile.losses.linear_loss_call import LinearCrossEntropyCall
from spcompile.machine.sequence import chunk_length
from spcompile.sharding.rules.rule import LocalCall, OpRule, rule_of

A, B, D, C = 2, 6, 4, 7
RANKS = [2, 3, 4, 7]


def operands() -> dict[str, Any]:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((A, B, D), (C, D), (C,)))
    labels = torch.randint(0, C, (A, B))
    labels[0, :2] = -100
    return {"x": x, "weight": weight, "bias": bias, "labels": labels, "classes": C}


def rule_for(**given: Any) -> OpRule:
    graph, mode = fx.Graph(), FakeTensorMode()

    def input_of(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(value.detach())
        return node

    call = LinearCrossEntropyCall(**{name: input_of(name, value) for name, value in given.items()})
    rule = rule_of(call.insert(like=graph.output(())))
    assert rule is not None
    return rule


RESULTS = "-> a b, a b, a b"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, f"a b [c], d [c], d, a b {RESULTS} | d: complete"),
        ({"bias": None}, f"a b [c], d [c], a b {RESULTS} | d: complete"),
        ({"class_weight": torch.ones(C)}, f"a b [c], d [c], d, a b, [e] {RESULTS} | d: complete"),
        ({"first": torch.tensor(0)}, f"a b [c], [d] [c], [d], a b, () {RESULTS}"),
    ],
)
def test_text(more: dict[str, Any], text: str) -> None:
    rule = rule_for(**{**operands(), **more})
    assert rule.text() == text
    assert rule.contracted == {"c"}


class Ranks:
    """One rank; what all of them send was computed before."""

    def __init__(self, rank: int, size: int, sent: list[Tensor]) -> None:
        self.rank, self.size, self.sent = rank, size, sent
        self.own = torch.empty(0)

    def first(self, length: int, device: torch.device) -> Tensor:
        return torch.tensor(self.rank * self.size)

    def gather(self, x: Tensor) -> Tensor:
        self.own = x.detach()
        return torch.stack([x if rank == self.rank else part for rank, part in enumerate(self.sent or [x])])


@pytest.mark.parametrize("degree", RANKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_classes_on_ranks(degree: int, weighted: bool) -> None:
    """Every rank has the whole results; gradients of rows are terms of a sum, those of the weight are parts."""
    more = {"with_total": True, "class_weight": torch.rand(C, dtype=torch.float64) if weighted else None}
    whole = LinearCrossEntropyCall(**operands(), **more)
    rule, size = rule_for(**operands(), **more), chunk_length(C, degree, "contiguous")
    expected = whole.run()
    upstream = [torch.randn(B * A, dtype=torch.float64).view(A, B) for _ in expected]
    dx, dw, db = torch.autograd.grad(expected, (whole.x, whole.weight, whole.bias), upstream)

    def padded(x: Tensor) -> list[Tensor]:
        rows = torch.cat([x.detach(), 1e3 * torch.ones(size * degree - C, *x.shape[1:], dtype=x.dtype)])
        return [part.clone().requires_grad_() for part in rows.split(size)]

    weights, biases = padded(whole.weight), padded(whole.bias)

    def on(rank: int, sent: list[Tensor]) -> tuple[Any, Ranks]:
        ranks = Ranks(rank, size, sent)
        args = tuple(whole.but(weight=weights[rank], bias=biases[rank]).named().values())
        assert rule.local is not None
        return rule.local(LocalCall(args, {}, ((A, B),) * 3, "d", C, degree, ranks)), ranks

    sent = [on(rank, [])[1].own for rank in range(degree)]
    rows = torch.zeros_like(dx)
    for rank in range(degree):
        results, _ = on(rank, sent)
        torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
        of_rows, of_weight, of_bias = torch.autograd.grad(results, (whole.x, weights[rank], biases[rank]), upstream)
        rows += of_rows
        present = max(0, min(size, C - rank * size))
        part = slice(rank * size, rank * size + present)
        torch.testing.assert_close(of_weight[:present], dw[part], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_bias[:present], db[part], rtol=1e-12, atol=1e-12)
        assert not of_weight[present:].any()
        assert not of_bias[present:].any()
    torch.testing.assert_close(rows, dx, rtol=1e-12, atol=1e-12)


def test_rows_on_ranks() -> None:
    """Each rank's rows are computed alone."""
    whole = LinearCrossEntropyCall(**operands(), with_total=True)
    expected = whole.run()
    for rank in range(2):
        rows = slice(rank * B // 2, (rank + 1) * B // 2)
        found = whole.but(x=whole.x[:, rows], labels=whole.labels[:, rows]).run()
        torch.testing.assert_close(found, tuple(x[:, rows] for x in expected), rtol=1e-12, atol=1e-12)
