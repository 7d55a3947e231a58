"""choose-attention: by head counts, bytes and the user's wish, with the reason in a remark."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, nodes_of, remarks_of
from torch import Tensor

from spcompile.program import LocalProgram


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def chosen(heads: int, key_heads: int, degree: int, function: object = causal, **options: object) -> LocalProgram:
    inputs = [torch.randn(1, n, 8, 4) for n in (heads, key_heads, key_heads)]
    return after_pass("choose-attention", function, inputs, degree, **options)  # type: ignore[arg-type]


def strategy(program: LocalProgram) -> str:
    (attention,) = nodes_of(program, "spx.attention")
    return attention.meta["custom"]["spx_attention"]


@pytest.mark.parametrize(
    ("heads", "key_heads", "degree", "expected"),
    [
        (4, 4, 2, "ulysses"),  # fewer bytes
        (3, 3, 2, "ring"),  # heads do not divide
        (12, 3, 2, "ring"),  # key heads and ranks do not divide each other
        (4, 2, 4, "ulysses"),  # key heads repeated up to one a rank
        (8, 2, 4, "ring"),  # the same, and with more that is exchanged again in the backward
        (16, 1, 2, "ring"),  # one key head: little to send around
    ],
)
def test_auto(heads: int, key_heads: int, degree: int, expected: str) -> None:
    program = chosen(heads, key_heads, degree)
    assert strategy(program) == expected
    (remark,) = remarks_of(program, "SPR203")
    assert not remark.strict_error


@pytest.mark.parametrize("asked", ["ring", "ulysses"])
def test_the_wish_counts_where_it_fits(asked: str) -> None:
    assert strategy(chosen(4, 4, 2, attention=asked)) == asked


def test_a_wish_that_does_not_fit_is_remarked() -> None:
    program = chosen(3, 3, 2, attention="ulysses")
    assert strategy(program) == "ring"
    (remark,) = remarks_of(program, "SPR204")
    assert "3 heads do not divide by cp = 2" in remark.text


@pytest.mark.parametrize(
    ("function", "options", "order"),
    [
        (causal, {"attention": "ring"}, "zigzag"),
        (causal, {"attention": "ring", "balance": "contiguous"}, "contiguous"),
        (causal, {"attention": "ring", "outputs": "sharded"}, "contiguous"),  # a DTensor's shards are contiguous
        (causal, {"attention": "ulysses"}, "contiguous"),
        (full, {"attention": "ring"}, "contiguous"),
    ],
)
def test_the_order_of_the_sequence(function: object, options: dict[str, object], order: str) -> None:
    assert chosen(4, 4, 2, function, **options).ctx.order == order
