"""choose-attention: by head counts, bytes and the user's wish, with the reason in a remark."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, nodes_of, remarks_of
from torch import Tensor

from spcompile.program.build import LocalProgram


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
        (8, 2, 2, "ring"),  # next to nothing to send: fewer messages
        (8, 2, 8, "ulysses"),  # the same, with more hops
        (3, 3, 2, "ring"),
    ],
)
def test_auto_says_what_it_predicts(heads: int, key_heads: int, degree: int, expected: str) -> None:
    program = chosen(heads, key_heads, degree)
    assert strategy(program) == expected
    (remark,) = remarks_of(program, "SPR203")
    assert not remark.strict_error
    assert f"{heads} heads, {key_heads} key/value heads" in remark.text
    hybrids = ["hybrid 2x4 ", "hybrid 4x2 "] if degree == 8 else []
    assert all(part in remark.text for part in ("ulysses ", "ring ", "iB, ", " ms", *hybrids))


def test_auto_reads_the_table_of_links() -> None:
    fast, slow = (remarks_of(chosen(8, 8, 2, links={"cp": name}), "SPR203") for name in ("nvlink", "network"))
    assert fast[0].text != slow[0].text


@pytest.mark.parametrize("asked", ["ring", "ulysses"])
def test_the_wish_counts_where_it_fits(asked: str) -> None:
    assert strategy(chosen(4, 4, 2, attention=asked)) == asked


def test_ulysses_where_heads_do_not_divide() -> None:
    assert strategy(chosen(3, 3, 2, attention="ulysses")) == "ulysses"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"ulysses": 4, "ring": 2}, "hybrid 4x2"),
        ({"ring": 4, "ulysses": 2}, "hybrid 2x4"),
        ({"ulysses": 8, "ring": 1}, "ulysses"),
        ({"ulysses": 1, "ring": 8}, "ring"),
        ("hybrid", "hybrid 4x2"),
    ],
)
def test_factors(asked: object, expected: str) -> None:
    program = chosen(4, 4, 8, attention=asked)
    assert strategy(program) == expected
    assert remarks_of(program, "SPR203")


def test_a_hybrid_of_a_prime_number_of_ranks_is_remarked() -> None:
    program = chosen(4, 4, 3, attention="hybrid")
    assert strategy(program) in ("ring", "ulysses")
    (remark,) = remarks_of(program, "SPR204")
    assert "cp = 3 is not a product" in remark.text


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("bias_heads", [1, 4])
def test_a_dense_bias_that_all_heads_share_keeps_the_ring(bias_heads: int) -> None:
    """One that has heads is split by them."""
    inputs = [*(torch.randn(1, 4, 8, 4) for _ in range(3)), torch.randn(1, bias_heads, 8, 8, requires_grad=True)]
    program = after_pass("choose-attention", biased, inputs, 4, attention="ulysses")
    assert strategy(program) == ("ring" if bias_heads == 1 else "ulysses")
    assert [r.code for r in program.ctx.remarks.rows if "attention" in r.text] == [
        "SPR204" if bias_heads == 1 else "SPR203"
    ]


def two_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v) + causal(q[:, :6], k[:, :6], v[:, :6]).sum()


def test_all_hybrids_of_a_program_divide_the_axis_alike() -> None:
    program = chosen(12, 12, 8, two_attentions, attention="hybrid")
    found = {node.meta["custom"]["spx_attention"] for node in nodes_of(program, "spx.attention")}
    assert len(found) == 1


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 2))


def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return windowed(causal(q, k, v), k, v)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("function", "options", "order"),
    [
        (causal, {"attention": "ring"}, "zigzag"),
        (causal, {"attention": "ring", "balance": "contiguous"}, "contiguous"),
        (causal, {"attention": "ring", "outputs": "sharded"}, "contiguous"),  # a DTensor's shards are contiguous
        (causal, {"attention": "ulysses"}, "contiguous"),
        (causal, {"attention": "hybrid"}, "zigzag"),
        (full, {"attention": "ring"}, "contiguous"),
        (windowed, {"attention": "ring"}, "contiguous"),  # balanced as it is, and one hop instead of three
    ],
)
def test_the_order_of_the_sequence(function: object, options: dict[str, object], order: str) -> None:
    assert chosen(4, 4, 4, function, **options).ctx.order == order


@pytest.mark.thinned(2)
def test_layers_that_alternate_between_masks_share_the_order_that_suits_most() -> None:
    def order(length: int) -> str:
        inputs = [torch.randn(1, 4, length, 4) for _ in range(3)]
        return after_pass("choose-attention", both, inputs, 4, attention="ring", links={"cp": "nvlink"}).ctx.order

    assert order(8) == "contiguous"  # next to no work: a hop less counts
    assert order(4096) == "zigzag"
