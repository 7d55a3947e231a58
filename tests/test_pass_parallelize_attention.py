"""parallelize-attention: ring and Ulysses give the gathered attention's numbers; what goes over the wire is small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, check_pipeline, nodes_of
from torch import Tensor


def heads(count: int, length: int, width: int = 2, batch: int = 2) -> Tensor:
    return (0.5 * torch.randn(batch, count, length, width, dtype=torch.float64)).requires_grad_()


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    distance = at[:, None] - at[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 3), enable_gqa=True)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("function", [causal, full, windowed])
@pytest.mark.parametrize(("degree", "length"), [(2, 8), (2, 7), (4, 5), (4, 3)])
def test_strategies(
    strategy: str, query_heads: int, key_heads: int, function: object, degree: int, length: int
) -> None:
    inputs = [heads(query_heads, length), heads(key_heads, length), heads(key_heads, length)]
    program = check_pipeline(function, inputs, {"cp": degree}, attention=strategy)  # type: ignore[arg-type]
    assert len(nodes_of(program, "spx.ring_attention")) == (strategy == "ring")
    repeated = key_heads < degree  # then keys and values travel apart
    assert len(nodes_of(program, "spx.all_to_all")) == (2 + repeated if strategy == "ulysses" else 0)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_values_of_another_width(strategy: str) -> None:
    inputs = [heads(4, 7, 4), heads(4, 7, 4), heads(4, 7, 3)]
    check_pipeline(full, inputs, {"cp": 2}, attention=strategy)


def test_ulysses_of_two_lengths_sends_queries_and_keys_apart() -> None:
    program = check_pipeline(full, [heads(4, 7), heads(4, 5), heads(4, 5)], {"cp": 2}, attention="ulysses")
    assert len(nodes_of(program, "spx.all_to_all")) == 4


def test_keys_are_neither_gathered_nor_repeated_for_a_ring() -> None:
    inputs = [heads(8, 8), heads(2, 8), heads(2, 8)]
    program = after_pass("parallelize-attention", causal, inputs, attention="ring")
    (ring,) = nodes_of(program, "spx.ring_attention")
    assert tuple(ring.args[1].meta["val"].shape) == (2, 2, 4, 2)
    gathers = nodes_of(program, "spx.all_gather")
    assert [n.args[-1] for n in gathers] == ["I"]  # the output alone


def test_a_dense_bias_is_split_by_query_rows() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    bias = torch.randn(1, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    program = check_pipeline(biased, [heads(4, 7), heads(4, 7), heads(4, 7), bias], {"cp": 2}, attention="auto")
    (ring,) = nodes_of(program, "spx.ring_attention")
    assert tuple(ring.args[6].meta["val"].shape) == (1, 1, 4, 7)
