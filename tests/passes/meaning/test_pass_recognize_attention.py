"""recognize-attention: every spelling of attention, what is refused, and where repeated heads are undone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from recognition import qkv, rewrite, run_passes
from score_graphs import capped, causal
from torch import Tensor

from spcompile.capture.retrace import capture
from spcompile.passes.meaning.recognize_attention import EXAMPLES

sdpa = F.scaled_dot_product_attention


class TestGoldenText(expecttest.TestCase):
    def test_grouped_sdpa(self) -> None:
        self.assertExpectedInline(
            rewrite(EXAMPLES[0].function, EXAMPLES[0].inputs()).text,
            """\
l_k_: "f64[2, 2, 12, 4]" = input
l_q_: "f64[2, 4, 12, 4]" = input
l_v_: "f64[2, 2, 12, 4]" = input
attention_default: "(f64[2, 4, 12, 4], f64[2, 4, 12])" = spx.attention(l_q_, l_k_, l_v_, None, None, None, None, None, None, 'causal', 0.5)
getitem: "f64[2, 4, 12, 4]" = attention_default[0]
return (getitem,)
""",  # noqa: E501
        )

    def test_written_out(self) -> None:
        self.assertExpectedInline(
            rewrite(EXAMPLES[1].function, EXAMPLES[1].inputs()).text,
            """\
l_q_: "f64[2, 4, 12, 4]" = input
l_k_: "f64[2, 4, 12, 4]" = input
l_v_: "f64[2, 4, 12, 4]" = input
attention_default: "(f64[2, 4, 12, 4], f64[2, 4, 12])" = spx.attention(l_q_, l_k_, l_v_, None, None, None, None, None, None, 'causal', 0.5)
getitem: "f64[2, 4, 12, 4]" = attention_default[0]
return (getitem,)
""",  # noqa: E501
        )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa(is_causal: bool, scale: float | None) -> None:
    found = rewrite(lambda q, k, v: sdpa(q, k, v, is_causal=is_causal, scale=scale), qkv())
    assert found.rewrites == (1, 0)
    assert found.masks == ["causal" if is_causal else "full"]
    assert found.attentions[0].args[10] == (scale or 1 / math.sqrt(6))
    assert not [op for op in found.ops() if "scaled_dot" in op]


def test_sdpa_causal_is_aligned_at_the_first_key() -> None:
    assert rewrite(lambda q, k, v: sdpa(q, k, v, is_causal=True), qkv(queries=5, keys=12)).masks == ["causal"]


def test_sdpa_enable_gqa() -> None:
    found = rewrite(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), qkv(4, 2))
    assert [n.meta["val"].shape[1] for n in found.attentions[0].args[:3]] == [4, 2, 2]


def test_sdpa_of_rank_3() -> None:
    q, k, v = (x[0].detach().requires_grad_() for x in qkv())
    bias = torch.randn(4, 12, 12, dtype=torch.float64).requires_grad_()
    found = rewrite(lambda q, k, v, bias: sdpa(q, k, v, attn_mask=bias), (q, k, v, bias))
    assert found.masks == ["full + bias"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("shape", [(12, 12), (1, 12), (12, 1), (2, 1, 1, 12), (4, 12, 12), (2, 4, 12, 12)])
def test_sdpa_bias_keeps_its_gradient(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=torch.float64).requires_grad_()
    found = rewrite(lambda q, k, v, bias: sdpa(q, k, v, attn_mask=bias), (*qkv(), bias))
    assert found.masks == ["full + bias"]
    rows = 1 if len(shape) > 1 and shape[-2] == 1 else 12
    assert found.attentions[0].args[8].meta["val"].shape[2:] == (rows, 12)  # type: ignore[union-attr]


def test_sdpa_bool_mask_with_a_row_without_keys() -> None:
    mask = torch.rand(2, 1, 12, 12) < 0.5
    mask[:, :, 3] = False
    assert rewrite(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), (*qkv(), mask)).masks == ["full + bias"]


def expand_reshape(x: Tensor, n: int) -> Tensor:
    B, G, T, H = x.shape
    return x[:, :, None, :, :].expand(B, G, n, T, H).reshape(B, G * n, T, H)


REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand and reshape": expand_reshape,
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, dim=1),
    "repeat of an inserted dim": lambda x, n: x.unsqueeze(2).repeat(1, 1, n, 1, 1).flatten(1, 2),
    "before the transpose": lambda x, n: x.transpose(1, 2).repeat_interleave(n, 2).transpose(1, 2),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("repeat", REPEATS)
def test_repeated_heads_are_taken_before_the_repeat(repeat: str, key_heads: int) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, REPEATS[repeat](k * 2, 4 // key_heads), REPEATS[repeat](v + 1, 4 // key_heads))

    found = rewrite(model, qkv(4, key_heads))
    k, v = (found.attentions[0].args[i].meta["val"] for i in (1, 2))  # type: ignore[union-attr]
    assert k.shape[1] == v.shape[1] == key_heads


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "tile", [lambda x: x.repeat(1, 2, 1, 1), lambda x: torch.cat([x, x], 1), lambda x: x[:, [1, 0, 1, 0]]]
)
def test_heads_repeated_in_another_order_stay_repeated(tile: Callable[[Tensor], Tensor]) -> None:
    found = rewrite(lambda q, k, v: sdpa(q, tile(k), tile(v)), qkv(4, 2))
    assert found.attentions[0].args[1].meta["val"].shape[1] == 4  # type: ignore[union-attr]


def test_keys_alone_repeated() -> None:
    found = rewrite(lambda q, k, v: sdpa(q, k.repeat_interleave(2, 1), torch.cat([v, v], 1)), qkv(4, 2))
    assert found.rewrites == (1, 0)


def test_a_detached_repeat_keeps_its_missing_gradient() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k.detach().repeat_interleave(2, 1), v.repeat_interleave(2, 1))

    found = rewrite(model, qkv(4, 2))
    assert found.attentions[0].args[1].target == torch.ops.aten.detach.default  # type: ignore[union-attr]


def folded(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def bmm_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(folded(q), folded(k).transpose(1, 2))
    scores = scores.view(*q.shape[:3], -1) * 0.5
    scores = scores.masked_fill(~causal(q, k), -math.inf).view(-1, q.shape[2], k.shape[2])
    return torch.bmm(F.softmax(scores, dim=-1), folded(v)).view(q.shape)


def bmm_folded_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype).masked_fill(~causal(q, k), -math.inf)
    mask = mask.expand(q.shape[0] * q.shape[1], -1, -1)
    return torch.bmm(torch.softmax(torch.bmm(folded(q), folded(k).mT) * 0.5 + mask, -1), folded(v))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.arange(1, 1 + q.shape[1]).to(q.dtype)[None, :, None, None]
    alibi = (slopes * torch.arange(k.shape[2])).expand(q.shape[0], -1, 1, -1).reshape(-1, 1, k.shape[2])
    alibi = alibi.expand(-1, q.shape[2], -1)
    scores = torch.baddbmm(alibi, folded(q), folded(k).transpose(1, 2), beta=0.5, alpha=0.3)
    weights = scores.view(*q.shape[:3], -1).masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def einsum_bsnh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqnh,bknh->bnqk", q, k) * 0.5
    weights = torch.where(causal(q.transpose(1, 2), k.transpose(1, 2)), scores, -math.inf).softmax(-1)
    return torch.einsum("bnqk,bknh->bqnh", weights, v)


def einsum_with_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("... s h, ... t h -> ... s t", q, k) * 0.5
    weights = torch.where(causal(q, k), scores, -math.inf).softmax(-1)
    return torch.einsum("...st,...tv", weights, v)


def einsum_of_one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bjd->bhij", q, k[:, 0]) * 0.5
    weights = torch.where(causal(q, k), scores, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v[:, 0])


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (expand_reshape(x, 2) for x in (k[:, :2], v[:, :2]))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.5 + torch.full(
        (q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype
    ).triu(1)
    return torch.matmul(F.dropout(scores.softmax(-1), p=0.1, training=False), v).transpose(1, 2).contiguous()


def scale_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = ((q * 0.1) @ k.permute(0, 1, 3, 2) + 1.0 * torch.arange(k.shape[2])) * 3.0
    return torch.softmax(scores.masked_fill(~causal(q, k), -1e9) / 2, -1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).double() / math.sqrt(6) + torch.where(causal(q, k), 0.0, -math.inf)
    return torch.softmax(scores, -1, dtype=torch.float64).to(q.dtype) @ v


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    "model", [bmm_folded, bmm_folded_mask, einsum_bsnh, einsum_of_one_key_head, einsum_with_dots, repeated, upcast]
)
def test_written_out_causal(model: Callable[..., Any]) -> None:
    found = rewrite(model, qkv())
    assert found.rewrites == (1, 1)
    assert str(found.mask) == "causal"
    assert not found.remarks.rows
    assert (12, 12) not in {size[-2:] for size in found.sizes()}
    if model is repeated:
        assert found.attentions[0].args[1].meta["val"].shape[1] == 2  # type: ignore[union-attr]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", [baddbmm, scale_first])
def test_written_out_with_a_bias(model: Callable[..., Any]) -> None:
    found = rewrite(model, qkv())
    assert found.masks == ["causal + alibi"]


def test_written_out_with_a_learned_bias() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v

    bias = torch.randn(1, 4, 12, 12, dtype=torch.float64).requires_grad_()
    assert rewrite(model, (*qkv(), bias)).masks == ["causal + bias"]


def test_a_padded_bias_excludes_nothing() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        bias = F.pad(bias, (0, 2), value=0.5)
        return (q @ k.mT + bias).masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v

    bias = torch.randn(4, 12, 10, dtype=torch.float64).requires_grad_()
    assert rewrite(model, (*qkv(), bias)).masks == ["causal + bias"]


def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).float() * 0.5, -1).to(q.dtype) @ v


def test_low_precision_keeps_its_dtype() -> None:
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in qkv())
    outputs = []
    compiled = torch.compile(half, backend=lambda gm, ex: outputs.append(run_passes(capture(gm, ex))) or gm.forward)
    assert compiled(q, k, v).dtype == torch.bfloat16
    (node,) = outputs[0].attentions
    assert {n.meta["val"].dtype for n in node.args[:3]} == {torch.bfloat16}


def returned_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def two_finite_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = (torch.arange(k.shape[2]) < q.detach()[:, 0, 0, :1] * 3 + 4)[:, None, None, :]
    scores = (q @ k.mT).masked_fill(~keep, -1e9)
    return scores.masked_fill(~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


def small_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~causal(q, k), -5.0).softmax(-1) @ v


def broadcast_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q[:, :1] @ k[:, :1].mT).expand(-1, 4, -1, -1) + torch.zeros(4, 1, 1, dtype=q.dtype)).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def sinks_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, q[..., :1]], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def cut_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([torch.ones_like(q[..., :1]), q @ k.mT], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def masked_inside_of_the_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return capped((q @ k.mT).masked_fill(~causal(q, k), -1e9)).softmax(-1) @ v


def capped_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return capped(capped(q @ k.mT)).softmax(-1) @ v


def number_inside_of_the_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return capped(q @ k.mT + 0.5).softmax(-1) @ v


def number_beside_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([torch.arange(4.0).to(q.dtype)[:, None, None].expand(2, -1, 12, 1), q @ k.mT + 0.5], -1)
    return torch.softmax(scores, -1)[..., 1:] @ v


def heads_behind_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("bsht,bthd->bshd", torch.einsum("bshd,bthd->bsht", q, k).softmax(-1), v)


def one_key_for_all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bshd,btd->bsht", q.transpose(1, 2), k[:, 0]).softmax(-1)
    return torch.einsum("bsht,btd->bshd", weights, v[:, 0])


REFUSED = {
    heads_behind_rows: "an einsum",
    one_key_for_all_heads: "an einsum",
    number_inside_of_the_cap: "a number is added",
    number_beside_sinks: "a number is added",
    sinks_by_row: "not one number for each head",
    cut_elsewhere: "cut elsewhere",
    masked_inside_of_the_cap: "inside of a softcap",
    capped_twice: "softcap of a softcap",
    returned_weights: "weights are read",
    two_finite_masks: "keys that fewest of its masks exclude",
    small_fill: "large negative",
    broadcast_scores: "no multiple of the key heads",
    over_queries: "not over the keys",
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("model", REFUSED, ids=lambda f: f.__name__)
def test_refused_with_a_remark(model: Callable[..., Any]) -> None:
    found = rewrite(model, qkv())
    assert found.rewrites == (0, 0)
    (remark,) = found.remarks.rows
    assert remark.code == "SPR202"
    assert REFUSED[model] in remark.text
    assert remark.where is not None
    assert remark.where.file.endswith(("test_pass_recognize_attention.py", "score_graphs.py"))


@pytest.mark.parametrize(
    "model", [lambda q, k, v: q.softmax(-1), lambda q, k, v: q.softmax(-1).sum(-1) * k[0, 0, 0, :1].sum()]
)
def test_other_softmaxes_are_left_alone_without_a_remark(model: Callable[..., Any]) -> None:
    found = rewrite(model, qkv())
    assert not found.remarks.rows
    assert found.rewrites == (0, 0)


def test_any_number_of_batches() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (2, 2)).transpose(0, 1) for x in (q, k, v))
        return sdpa(q, k, v, is_causal=True)

    found = rewrite(model, qkv())
    assert found.masks == ["causal"]
    assert found.attentions[0].args[0].meta["val"].shape == (4, 2, 12, 6)  # type: ignore[union-attr]
