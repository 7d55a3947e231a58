"""Few queries over a long sequence: keys stay split, what ranks see is merged, and all else is split as usual."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from example_numerics import after_pass, check_pipeline, nodes_of, remarks_of
from torch import Tensor

from spcompile.attention.scores.attention_call import AttentionCall

HEADS = 2


def heads(x_BSD: Tensor) -> Tensor:
    return x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs(queries: int, length: int) -> list[Tensor]:
    return [made(1, queries, 4), made(2, length, 4), made(4, 4), made(4, 4)]


def pooled(q_1QD: Tensor, x_BSD: Tensor, up_DD: Tensor, w_DD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Learned queries pool a sequence on which nothing else is mixed."""
    h_BSD = x_BSD + (x_BSD @ up_DD).tanh()
    q_BNQH, k_BNSH = heads(q_1QD.expand(x_BSD.shape[0], -1, -1)), heads(h_BSD @ w_DD)
    return F.scaled_dot_product_attention(q_BNQH, k_BNSH, heads(h_BSD), mask).transpose(1, 2).flatten(2)


def encoded_and_pooled(q_1QD: Tensor, x_BSD: Tensor, up_DD: Tensor, w_DD: Tensor) -> Tensor:
    h_BSD = F.scaled_dot_product_attention(heads(x_BSD), heads(x_BSD), heads(x_BSD)).transpose(1, 2).flatten(2)
    return pooled(q_1QD, h_BSD, up_DD, w_DD)


def in_steps(q_1QD: Tensor, x_BSD: Tensor, up_DD: Tensor, w_DD: Tensor) -> Tensor:
    """The attention of pooling written out, over tokens of which some count for nothing."""
    h_BSD = x_BSD + (x_BSD @ up_DD).tanh()
    counts_S = torch.arange(x_BSD.shape[1]) % 3 != 1
    scores = heads(q_1QD.expand(x_BSD.shape[0], -1, -1)) @ heads(h_BSD @ w_DD).mT
    weights = scores.masked_fill(~counts_S, -torch.inf).softmax(-1)
    return weights @ heads(h_BSD)


def channels_and_pooled(q_1QD: Tensor, x_BSD: Tensor, up_DD: Tensor, w_DD: Tensor) -> Tensor:
    """Attention of channels to channels, which sums over the sequence that is pooled behind it."""
    q_BSD, k_BSD = torch.cat((x_BSD @ up_DD, x_BSD @ w_DD), -1).split(x_BSD.shape[-1], -1)
    weights_BDE = (q_BSD.mT @ k_BSD).softmax(-1)
    return pooled(q_1QD, x_BSD + (weights_BDE @ x_BSD.mT).mT, up_DD, w_DD)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("degree", [2, 3])
def test_channels_that_attend_to_channels_before_the_pooling(degree: int) -> None:
    check_pipeline(channels_and_pooled, inputs(1, 8), {"cp": degree})


@pytest.mark.thinned(4, covers=["function"])
@pytest.mark.parametrize("function", [pooled, encoded_and_pooled, in_steps])
@pytest.mark.parametrize(("degree", "queries", "length"), [(2, 1, 8), (2, 1, 7), (3, 1, 4), (4, 2, 65)])
def test_keys_stay_split(function: Callable[..., Tensor], degree: int, queries: int, length: int) -> None:
    program = check_pipeline(function, inputs(queries, length), {"cp": degree})
    calls = map(AttentionCall.of, AttentionCall.all_in(program.gm.graph))
    (merged,) = (call for call in calls if call.k_positions is not None)
    assert merged.sizes.k_rows == -(-length // degree)
    assert remarks_of(program, "SPR203")
    assert not [remark for remark in program.ctx.remarks.rows if remark.code != "SPR203"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("balance", ["zigzag", "contiguous"])
def test_a_causal_encoder_is_pooled_in_its_order(balance: str) -> None:
    def model(q_1QD: Tensor, x_BSD: Tensor, up_DD: Tensor, w_DD: Tensor) -> Tensor:
        h = heads(x_BSD)
        h_BSD = F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2).flatten(2)
        return pooled(q_1QD, h_BSD, up_DD, w_DD)

    program = check_pipeline(model, inputs(1, 11), {"cp": 2}, attention="ring", balance=balance)
    assert program.ctx.order == balance


@pytest.mark.thinned(3)
def test_ranks_without_keys_and_rows_without_keys() -> None:
    """The first entry sees keys of the first rank only, the second none at all."""

    def model(q: Tensor, x: Tensor, up: Tensor, w: Tensor, lengths_B: Tensor) -> Tensor:
        seen_BS = torch.arange(x.shape[1]) < lengths_B[:, None]
        return pooled(q, x, up, w, seen_BS[:, None, None, :])

    check_pipeline(model, [*inputs(1, 9), torch.tensor([2, 0])], {"cp": 3})


@pytest.mark.thinned(3)
def test_the_patches_of_an_image_are_pooled() -> None:
    def model(q_1QD: Tensor, image_BHWD: Tensor, up_DD: Tensor, w_DD: Tensor) -> Tensor:
        return pooled(q_1QD, image_BHWD.sin().flatten(1, 2), up_DD, w_DD)

    check_pipeline(model, [made(1, 1, 4), made(2, 3, 4, 4), made(4, 4), made(4, 4)], {"cp": 2})


def test_as_many_queries_as_a_sequence_has_are_split() -> None:
    program = after_pass("annotate-context-parallel", pooled, inputs(4, 64))
    (attention,) = nodes_of(program, "spx.attention")
    assert attention.meta["sharding"]["cp"] == "S(2)"
