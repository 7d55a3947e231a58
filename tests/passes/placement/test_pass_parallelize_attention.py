"""parallelize-attention: ring and Ulysses give the gathered attention's numbers; what goes over the wire is small."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from example_numerics import (
    after_pass,
    assert_equal,
    check_pipeline,
    compiled_locally,
    nodes_of,
    on_all_ranks,
    on_one_device,
)
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


@pytest.mark.thinned(9, covers=["strategy"])
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
    assert len(nodes_of(program, "spx.all_to_all")) == 3  # queries; keys with values; the result


@pytest.mark.thinned(8)
@pytest.mark.parametrize(("queries", "keys"), [(7, 5), (17, 19), (19, 17), (16, 15)])
@pytest.mark.parametrize("strategy", ["ulysses", {"ulysses": 2, "ring": 2}], ids=str)
def test_two_lengths_with_equally_many_rows_a_rank(strategy: object, queries: int, keys: int) -> None:
    inputs = [heads(4, queries), heads(4, keys), heads(4, keys)]
    check_pipeline(full, inputs, {"cp": 4}, attention=strategy)  # type: ignore[arg-type]


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


def capped_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.tanh(q @ k.mT / 2) * 2
    scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), -torch.inf)
    joined = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
    return joined.softmax(-1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1.0, q.shape[1] + 1, dtype=q.dtype)
    distance = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT) + slopes[:, None, None] * distance
    weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
    return weights @ (v * scale.sum()).repeat_interleave(q.shape[1] // v.shape[1], 1)


def learned_keys(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
    at = torch.arange(k.shape[2], dtype=q.dtype)
    bias = learned[:, None, None] * at.sin()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], enable_gqa=True)


@pytest.mark.thinned(3, covers=["strategy"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("function", [capped_with_sinks, alibi, learned_keys])
@pytest.mark.parametrize(("degree", "length"), [(2, 7), (4, 8), (4, 3)])
def test_what_belongs_to_heads_goes_with_them(strategy: str, function: object, degree: int, length: int) -> None:
    """A softcap, sinks, slopes and a bias of one row: their gradients are sums over ranks in either strategy."""
    by_head = torch.randn(4, dtype=torch.float64, requires_grad=True)
    inputs = [heads(4, length), heads(2, length), heads(2, length), by_head]
    program = check_pipeline(function, inputs, {"cp": degree}, attention=strategy)  # type: ignore[arg-type]
    assert len(nodes_of(program, "spx.ring_attention")) == (strategy == "ring")
    messages = 2 if degree <= 2 else 3  # repeated keys and values travel apart
    assert len(nodes_of(program, "spx.all_to_all")) == (messages if strategy == "ulysses" else 0)


def dropped(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q * w, k, v, is_causal=True, dropout_p=0.4, enable_gqa=True)
    return F.dropout(F.scaled_dot_product_attention(y, k, v, dropout_p=0.2, enable_gqa=True), 0.5)


@pytest.mark.thinned(3, covers=["strategy"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize(("degree", "length"), [(2, 7), (4, 8), (4, 3)])
def test_dropout_is_the_same_on_any_number_of_ranks(strategy: str, degree: int, length: int) -> None:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    inputs = [heads(4, length), heads(2, length), heads(2, length), weight]
    program, plain, given = compiled_locally(dropped, inputs, {"cp": degree}, attention=strategy)
    before = after_pass("recognize-loss", dropped, inputs)
    (alone,) = on_all_ranks(before.gm, given, {})
    for rank in on_all_ranks(program.gm, given, {"cp": degree}):
        assert_equal(rank, alone)
    assert not torch.allclose(on_one_device(plain, given)[0][0], alone[0][0])
    assert "SPR303" in [remark.code for remark in program.ctx.remarks.rows]
