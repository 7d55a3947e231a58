"""`explain` of attentions: strategies and what happens to scores, and bytes that are those that were predicted."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile import explain
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.strategy import Strategy
from spcompile.attention.strategy_cost import Problem, cost
from spcompile.machine.links import LINKS
from spcompile.report.plan import Plan


def total(plan: Plan, **wanted: str) -> sympy.Expr:
    rows = [row for row in plan.collectives if all(getattr(row, key) == value for key, value in wanted.items())]
    return sum((row.bytes for row in rows), sympy.Integer(0))


class Grouped(nn.Module):
    """Causal attention, and something that needs its result in the backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).square()


class Scored(nn.Module):
    """Attention that is written out, with everything that can happen to scores."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = 30 * torch.tanh(q @ k.mT / 30)
        slopes = 2.0 ** -torch.arange(1.0, q.shape[1] + 1)
        distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
        scores = (scores + slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)
        joined = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
        return F.dropout(joined.softmax(-1)[..., :-1], 0.1) @ v


@pytest.mark.thinned(12)
@pytest.mark.parametrize(("inner", "outer"), [(2, 2), (2, 4), (4, 2)])
def test_bytes_of_a_hybrid(inner: int, outer: int) -> None:
    """As Ulysses among the inner ranks; a ring of their joined rows, of a part of the heads, between the others."""
    length, n, width, degree = 64, 4, 6, inner * outer
    tensors = [torch.randn(1, n, length, width, requires_grad=True) for _ in range(3)]
    plan = explain(Grouped(), tensors, mesh={"cp": degree}, attention={"ulysses": inner, "ring": outer})
    one = (length // degree) * n * width * 4 * (inner - 1) // inner
    for phase, tensors in (("forward", 4), ("backward", 4 + 1)):
        assert total(plan, op="all_to_all", phase=phase, axis=f"cp.inner{inner}") == tensors * one
    message = (length // outer) * 2 * (n // inner) * width * 4
    axis = f"cp.outer{outer}"
    assert total(plan, op="ring_attention", axis=axis) == (outer - 1) * message
    assert total(plan, op="ring_attention_backward", axis=axis) == (2 * (outer - 1) + 1) * message
    assert [row.strategy for row in plan.attention] == [f"hybrid {inner}x{outer}"]
    assert f"1 x hybrid {inner}x{outer}: {n} heads" in str(plan)


@pytest.mark.thinned(10)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree"),
    [(4, 4, 2), (3, 3, 2), (6, 3, 4), (4, 4, 8), (6, 2, 4), (8, 1, 8)],
)
def test_predicted_bytes_are_those_of_the_graphs(heads: int, kv_heads: int, degree: int) -> None:
    """Also where heads are padded and key heads go to several ranks, and where the length is uneven."""
    for strategy in (Strategy(degree, 1), Strategy(1, degree), *Strategy.hybrids(degree)):
        for length in (64, 61):
            q, k, v = (torch.randn(2, n, length, 4, requires_grad=True) for n in (heads, kv_heads, kv_heads))
            asked = {"ulysses": strategy.inner, "ring": strategy.outer}
            plan = explain(Grouped(), (q, k, v), mesh={"cp": degree}, attention=asked)
            problem = Problem(2, heads, kv_heads, length, length, 4, 4, 4, AttentionMask(causal=True))
            predicted = cost(problem, strategy, plan.sharding.order, LINKS["nvlink"], LINKS["nvlink"], 1e12)
            assert total(plan, op="all_to_all") == predicted.inner_bytes
            rings = total(plan, op="ring_attention") + total(plan, op="ring_attention_backward")
            assert rings == predicted.outer_bytes


@pytest.mark.thinned(2)
def test_what_happens_to_scores_is_listed() -> None:
    tensors = [torch.randn(1, 4, 8, 4, requires_grad=True) for _ in range(3)]
    plan = explain(Scored(), (*tensors, torch.randn(4)), mesh={"cp": 2})
    assert [row.scores for row in plan.attention] == ["softcap 30, ALiBi, sinks, dropout 0.1"]
    assert "mask causal, softcap 30, ALiBi, sinks, dropout 0.1" in str(plan)
    assert plan.to_dict()["attention"][0]["scores"] == plan.attention[0].scores
    assert [row.kernel for row in plan.attention] == ["triton"]
