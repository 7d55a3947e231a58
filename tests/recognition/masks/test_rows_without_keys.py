"""Rows that see no key, masks with finite fills, where sums over keys will not do: an attention of such rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recognition import rewrite
from score_graphs import Layers, capped, causal, lowest_unless
from torch import Tensor, nn

from spcompile import explain, verify

B, N, S, H = 2, 4, 12, 6
LENGTHS = torch.tensor([0, 7])
F64, F32 = torch.finfo(torch.float64).min, torch.finfo(torch.float32).min


def qkv(key_heads: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, n, S, H, dtype=torch.float64, requires_grad=True) for n in (N, key_heads, key_heads)]


def last_keys(lengths: Tensor) -> Tensor:
    """The last keys of each sequence, none of the first: under a causal mask some rows have no key."""
    return (torch.arange(S) >= S - lengths[:, None])[:, None, None, :]


def windowed(q: Tensor, k: Tensor, window: int) -> Tensor:
    return causal(q, k) & ~causal(q, k).tril(-window)


def under_a_cap(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = causal(q, k) & last_keys(lengths)
    return (capped(q @ k.mT * 3) + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def under_a_cap_in_a_window(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = windowed(q, k, 4) & ~last_keys(lengths)
    return (capped(q @ k.mT * 3) + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def under_a_cap_in_groups(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    return under_a_cap(q, k, v, lengths)


def replaced_then_added(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Every row sees its own key under the first mask: GPT-Neo's global layers."""
    scores = torch.where(causal(q, k), q @ k.mT, F64)
    return (scores + lowest_unless(causal(q, k) & last_keys(lengths), q.dtype)).softmax(-1) @ v


def window_then_added(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """A row with padding alone in its window averages that and what is valid before: GPT-Neo's local layers."""
    scores = torch.where(windowed(q, k, 3), q @ k.mT, F64)
    return (scores + lowest_unless(causal(q, k) & ~last_keys(lengths), q.dtype)).softmax(-1) @ v


def replaced_then_added_to_zeros(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The second number stands in the place of zeros, which are no bias."""
    scores = torch.where(causal(q, k), q @ k.mT, F64)
    zeros = torch.zeros((), dtype=q.dtype)
    return (scores + torch.where(causal(q, k) & last_keys(lengths), zeros, F64)).softmax(-1) @ v


def added_twice(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = q @ k.mT + lowest_unless(causal(q, k), q.dtype)
    return (scores + lowest_unless(last_keys(lengths), q.dtype)).softmax(-1) @ v


def added_twice_under_a_cap(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = capped(q @ k.mT * 3) + lowest_unless(windowed(q, k, 3), q.dtype)
    return (scores + lowest_unless(causal(q, k) & ~last_keys(lengths), q.dtype)).softmax(-1) @ v


def larger_fill_last(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """As with a mask of a narrower dtype than the scores."""
    scores = torch.where(windowed(q, k, 3), q @ k.mT, F64)
    keep = causal(q, k) & ~last_keys(lengths)
    return (scores + lowest_unless(keep, torch.float32)).softmax(-1) @ v


def cap_and_bias(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = capped(q @ k.mT * 3) + torch.arange(S, dtype=q.dtype)
    return (scores + lowest_unless(causal(q, k) & last_keys(lengths), q.dtype)).softmax(-1) @ v


def in_one_call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Of torch's own attention: rows that add two lowest numbers to every key would be NaN."""
    mask = lowest_unless(causal(q, k), q.dtype) + lowest_unless(last_keys(lengths), q.dtype)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def beside_a_learned_bias(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """T5 and MPNet, written out: the bias has a gradient in rows without keys too."""
    bias = torch.nn.functional.embedding((torch.arange(S) - torch.arange(S)[:, None]).abs() % 6, q[0, :, 0].T)
    keep = causal(q, k) & last_keys(lengths)
    return (q @ k.mT + bias.permute(2, 0, 1) + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def rows_of_padding(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The mask is added to the bias first."""
    bias = q[:1, :, :, :1] * k[:1, :, :, 0][:, :, None]
    keep = torch.ones(S, S, dtype=torch.bool).tril(-1) & ~last_keys(lengths)
    return (q @ k.mT + (bias + lowest_unless(keep, q.dtype))).softmax(-1) @ v


def small_number(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    bias = q[:1, :, :, :1] * k[:1, :, :, 0][:, :, None]
    keep = causal(q, k) & last_keys(lengths)
    return (q @ k.mT + bias + torch.where(keep, 0.0, -1e9)).softmax(-1) @ v


def packed_documents(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    ids = (torch.arange(S) >= lengths[:, None]).long().cumsum(-1) // 3
    bias = q[:1, :, :, :1] * k[:1, :, :, 0][:, :, None]
    keep = (ids[:, None, :, None] == ids[:, None, None]) & last_keys(lengths)
    return (q @ k.mT + bias + lowest_unless(keep, q.dtype)).softmax(-1) @ v


READ: dict[Callable[..., Tensor], list[str]] = {
    under_a_cap: [f"causal documents fill={F32}"],
    under_a_cap_in_a_window: [f"causal window=4 documents fill={F32}"],
    under_a_cap_in_groups: [f"causal documents fill={F32}"],
    replaced_then_added: ["causal key_padding", f"causal documents rounded_by={F64}"],
    replaced_then_added_to_zeros: ["causal key_padding", f"causal documents rounded_by={F64}"],
    window_then_added: [
        "causal window=3 key_padding",
        f"causal window=3 documents rounded_by={F64}",
        "causal documents key_padding",
    ],
    added_twice: [
        "causal key_padding",
        f"causal documents rounded_by={F64}",
        f"documents key_padding rounded_by={F64}",
    ],
    added_twice_under_a_cap: [
        "causal window=3 key_padding",
        f"causal window=3 documents rounded_by={F64}",
        f"causal documents key_padding rounded_by={F64}",
    ],
    cap_and_bias: [f"causal documents fill={F64} + alibi"],
    larger_fill_last: ["causal window=3 key_padding", f"causal window=3 documents rounded_by={F32}"],
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("model", READ, ids=lambda f: f.__name__)
def test_such_rows_are_an_attention_of_their_own(model: Callable[..., Any]) -> None:
    found = rewrite(model, (*qkv(), LENGTHS))
    assert found.masks == READ[model]
    assert found.codes == []
    assert (S, S) not in {size[-2:] for size in found.sizes()}


WITH_BIAS: dict[Callable[..., Tensor], list[str]] = {
    beside_a_learned_bias: [f"causal documents fill={F64} + bias"],
    rows_of_padding: [f"causal offset=-1 documents fill={F64} + bias"],
    small_number: ["causal documents fill=-1000000000.0 + bias"],
    packed_documents: ["documents key_padding + bias", f"documents rounded_by={F64} + bias"],
}


@pytest.mark.parametrize("model", WITH_BIAS, ids=lambda f: f.__name__)
def test_a_learned_bias_stays_in_one_attention_unless_there_are_documents(model: Callable[..., Any]) -> None:
    assert rewrite(model, (*qkv(), LENGTHS)).masks == WITH_BIAS[model]


def unreadable(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (capped(q @ k.mT * 3) + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def unreadable_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (torch.where(causal(q, k), q @ k.mT, F64) + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def unreadable_with_a_bias(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """XLNet."""
    bias = q[:1, :, :, :1] * k[:1, :, :, 0][:, :, None]
    return (q @ k.mT + bias + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def bias_of_all_rows(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A mask that is one for all rows of a batch entry, where it may leave them none."""
    return unreadable_with_a_bias(q, k, v, keep.sort(-1).values[:, :, 4:5].roll(1, -1))


ATTENTIONS = {unreadable: 2, unreadable_with_a_bias: 1, bias_of_all_rows: 1, unreadable_twice: 3}


@pytest.mark.parametrize("model", ATTENTIONS, ids=lambda f: f.__name__)
def test_masks_without_structure_stay_dense_and_exact(model: Callable[..., Any]) -> None:
    keep = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(1)) > 0.7
    keep[:, :, 3:5] = False
    found = rewrite(model, (*qkv(), keep))
    assert len(found.attentions) == ATTENTIONS[model]
    assert found.masks[0].endswith("+ bias")


def smaller_fill_last(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = torch.where(windowed(q, k, 3), q @ k.mT, F32)
    return (scores + lowest_unless(causal(q, k) & ~last_keys(lengths), q.dtype)).softmax(-1) @ v


def maybe_no_key_under_either(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = torch.where(last_keys(lengths), q @ k.mT, F64)
    return (scores + lowest_unless(last_keys(lengths.flip(0)), torch.float32)).softmax(-1) @ v


@pytest.mark.parametrize("model", [smaller_fill_last, maybe_no_key_under_either], ids=lambda f: f.__name__)
def test_others_stay_written_out(model: Callable[..., Any]) -> None:
    found = rewrite(model, (*qkv(), LENGTHS))
    assert found.codes == ["SPR202"]
    assert found.attentions == []


MESHES = [{"cp": 2}, {"cp": 3}, {"tp": 2}, {"dp": 2}, {"tp": 2, "cp": 2}]


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(f"{k}{v}" for k, v in m.items()))
@pytest.mark.parametrize("model", [under_a_cap_in_a_window, window_then_added, rows_of_padding])
def test_every_gradient_on_all_ranks(model: Callable[..., Any], mesh: dict[str, int]) -> None:
    torch.manual_seed(1)
    x_BSD = torch.randn(B, S, N * H, dtype=torch.float64)
    report = verify(Layers(model, N), {"x_BSD": x_BSD, "given": LENGTHS}, mesh=mesh)
    assert report.ok, str(report)


@pytest.mark.thinned(7)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_no_remark_tells_of_a_loss(attention: str) -> None:
    x_BSD = torch.randn(B, S, N * H, dtype=torch.float64)
    batch = {"x_BSD": x_BSD, "given": LENGTHS}
    plan = explain(Layers(window_then_added, N), batch, mesh={"cp": 2}, attention=attention)
    assert {remark.code for remark in plan.remarks} <= {"SPR203", "SPR205"}
    report = verify(Layers(window_then_added, N), batch, mesh={"cp": 2}, attention=attention)
    assert report.ok, str(report)
