"""Attention in spellings of other people's models, read by laws of arithmetic; what is not read is split by rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spcompile import explain, verify

B, S, N, H = 2, 12, 2, 4
LOWEST = torch.finfo(torch.float64).min
INF = float("inf")

Attend = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Projections, then `attend` on [B, N, S, H]. band: a buffer of zeros and ones; distances: a learned bias."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.heads = nn.Linear(N * H, 3 * N * H, dtype=torch.float64)
        self.out = nn.Linear(N * H, N * H, dtype=torch.float64)
        self.distances = nn.Embedding(2 * S, N, dtype=torch.float64)
        self.register_buffer("band", torch.tril(torch.ones(2 * S, 2 * S, dtype=torch.float64))[None, None])

    def bias(self) -> Tensor:
        rows = torch.arange(S)
        return self.distances(rows[None] - rows[:, None] + S).permute(2, 0, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = self.heads(x).unflatten(-1, (3, N, H)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(self, q, k, v, valid).transpose(1, 2).flatten(2)).square().mean()


def causal() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def seen(valid: Tensor) -> Tensor:
    """With padding on the left, its rows see no key."""
    return causal() & valid[:, None, None, :]


def finite_before_the_mask(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.nan_to_num(q @ k.mT).masked_fill(~causal(), -INF).softmax(-1) @ v


def finite_behind_the_mask(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Rows without keys average all values, as with the lowest number."""
    return torch.nan_to_num((q @ k.mT).masked_fill(~seen(valid), -INF)).softmax(-1) @ v


def finite_at_last(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return torch.nan_to_num((q @ k.mT).masked_fill(~causal(), -INF).softmax(-1)) @ v


def times_a_band(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    band = m.band[:, :, :S, :S]
    return ((q @ k.mT) * band - 1e4 * (1 - band)).softmax(-1) @ v


def times_a_band_and_padded(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    band = m.band[:, :, :S, :S]
    scores = (q @ k.mT) * band - 1e4 * (1 - band)
    return (scores + (1 - valid[:, None, None, :].long()) * -1e4).softmax(-1) @ v


def in_steps(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -INF)
    exponentials = (scores - scores.max(-1)[0].unsqueeze(-1)).exp()
    return exponentials * (1 / exponentials.sum(-1).unsqueeze(-1)) @ v


def divided_at_last(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -INF)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return exponentials @ v / exponentials.sum(-1, keepdim=True)


def masked_exponentials(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = q @ k.mT
    exponentials = (scores - scores.max(-1, keepdim=True)[0].detach()).exp() * causal()
    return exponentials / exponentials.sum(-1, keepdim=True) @ v


def by_logarithms(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -INF)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def less_the_greatest_of_all(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.max()).masked_fill(~causal(), -INF).softmax(-1) @ v


def zero_where_masked(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Rows without keys are zeros, though scores get a finite number there."""
    hidden = ~seen(valid)
    return (q @ k.mT).masked_fill(hidden, LOWEST).softmax(-1).masked_fill(hidden, 0.0) @ v


def bias_before_a_fill(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    return (q @ k.mT + m.bias()).masked_fill(~seen(valid), LOWEST).softmax(-1) @ v


def bias_beside_a_fill(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Added to the mask first: the gradient of the bias in rows without keys is not 0."""
    mask = m.bias() + (1 - valid[:, None, None, :].double()) * LOWEST
    return (q @ k.mT + mask).softmax(-1) @ v


def heads_in_the_batch(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * N, S, H) for x in (q, k, v))
    scores = torch.einsum("bid,bjd->bij", q, k) + m.bias().repeat(B, 1, 1)
    keep = seen(valid).expand(B, N, S, S).reshape(B * N, S, S)
    weights = scores.masked_fill(~keep, -torch.finfo(scores.dtype).max).softmax(-1)
    return torch.einsum("bij,bjd->bid", weights, v).view(B, N, S, H)


PADDED = "causal key_padding"
APART = "dense bias, rows without keys apart"
READ: dict[Attend, tuple[str, str]] = {
    finite_before_the_mask: ("causal", ""),
    finite_behind_the_mask: (PADDED, ""),
    finite_at_last: ("causal", ""),
    times_a_band: ("causal", ""),
    times_a_band_and_padded: (PADDED, "rows without keys apart"),
    in_steps: ("causal", ""),
    divided_at_last: ("causal", ""),
    masked_exponentials: ("causal", ""),
    by_logarithms: ("causal", ""),
    less_the_greatest_of_all: ("causal", ""),
    zero_where_masked: (PADDED, ""),
    bias_before_a_fill: (PADDED, "dense bias"),
    bias_beside_a_fill: ("key_padding", APART),
    heads_in_the_batch: (PADDED, "dense bias"),
}


def inputs(of: Attend) -> tuple[Tensor, Tensor]:
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :4] = False
    if of is bias_beside_a_fill:
        valid[1] = False
    return torch.randn(B, S, N * H, dtype=torch.float64), valid


def share(plan: object) -> float:
    """Bytes that a rank saves, of those that one device does."""
    memory = plan.memory  # type: ignore[attr-defined]
    return float(memory.saved_activation_bytes / memory.saved_activation_bytes_one_device)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("attend", READ, ids=lambda f: f.__name__)
def test_one_attention_with_the_mask_that_was_meant(attend: Attend) -> None:
    model, given = Model(attend), inputs(attend)
    report = verify(model, given, mesh={"cp": 2})
    assert report.ok, str(report)
    plan = explain(model, given, mesh={"cp": 2})
    assert [(row.count, row.mask, row.scores) for row in plan.attention] == [(1, *READ[attend])]
    assert share(plan) <= 1.15 / 2
    if attend is bias_beside_a_fill:
        assert "documents" not in str(plan)


@pytest.mark.thinned(29)
@pytest.mark.parametrize("attend", READ, ids=lambda f: f.__name__)
def test_and_over_tp(attend: Attend) -> None:
    report = verify(Model(attend), inputs(attend), mesh={"tp": 2})
    assert report.ok, str(report)


def talking_heads(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~causal(), -INF).softmax(-1)
    return torch.einsum("nm,bmst->bnst", m.distances.weight[:N], weights) @ v


def a_factor_of_pairs(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """The factor of a score is no number of its row."""
    return ((q @ k.mT) * m.bias()).masked_fill(~causal(), -INF).softmax(-1) @ v


def a_row_of_its_own(m: Model, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """A band that is multiplied, and nothing excluded where it is 0."""
    return ((q @ k.mT) * m.band[:, :, :S, :S]).softmax(-1) @ v


UNREAD = [talking_heads, a_factor_of_pairs, a_row_of_its_own]


@pytest.mark.thinned(10)
@pytest.mark.parametrize("attend", UNREAD, ids=lambda f: f.__name__)
def test_what_is_not_read_keeps_the_promise_of_memory(attend: Attend) -> None:
    model, given = Model(attend), inputs(attend)
    report = verify(model, given, mesh={"cp": 2})
    assert report.ok, str(report)
    plan = explain(model, given, mesh={"cp": 2})
    assert plan.attention == []
    assert "SPR202" in {remark.code for remark in plan.remarks}
    assert share(plan) <= 1.15 / 2, str(plan)
