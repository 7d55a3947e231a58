"""Masks that are computed with numbers, as (1 - m) * c, also where rows see no key: every number c that is in use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from recognition import rewrite
from score_graphs import Layers, capped, causal
from torch import Tensor, nn

from spcompile import verify
from spcompile.recognition.masks.values import Element, Scaled, Unreadable, index_symbol

B, N, S, H = 3, 4, 12, 6
LOWEST = torch.finfo(torch.float64).min
NUMBERS = [-1e4, -1e9, -1e30, LOWEST]

# The first sequence is padding, the second has it on the left, the third on the right.
VALID = torch.stack([torch.zeros(S), (torch.arange(S) >= 5).double(), (torch.arange(S) < 9).double()]).long()


def qkv() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, N, S, H, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def of_keys(m: Tensor, number: float) -> Tensor:
    return (1.0 - m[:, None, None, :].double()) * number


def bidirectional(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    return (q @ k.mT + of_keys(m, number)).softmax(-1) @ v


def behind_minus_infinity(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(q, k), -math.inf)
    return (scores + of_keys(m, number)).softmax(-1) @ v


def behind_the_same_number(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    """GPT-2 as it used to be."""
    scores = torch.where(causal(q, k), q @ k.mT, torch.full((), number, dtype=q.dtype))
    return (scores + of_keys(m, number)).softmax(-1) @ v


def in_front_of_the_same_number(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    scores = q @ k.mT + (1.0 - causal(q, k).double()) * number
    return scores.masked_fill(m[:, None, None, :] == 0, number).softmax(-1) @ v


def times_a_triangle(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    both = torch.ones(S, S, dtype=q.dtype).tril() * m[:, None, None, :].to(q.dtype)
    return (q @ k.mT + (1.0 - both) * number).softmax(-1) @ v


def under_a_cap(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    scores = capped(q @ k.mT * 3).masked_fill(~causal(q, k), -math.inf)
    return (scores + of_keys(m, number)).softmax(-1) @ v


def replaced_behind_minus_infinity(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(q, k), -math.inf)
    return scores.masked_fill(m[:, None, None, :] == 0, number).softmax(-1) @ v


def replaced_in_front_of_minus_infinity(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    scores = (q @ k.mT).masked_fill(m[:, None, None, :] == 0, number)
    return scores.masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v


def with_slopes(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    distance = torch.arange(S) - torch.arange(S)[:, None]
    scores = q @ k.mT + distance * torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)[:, None, None]
    return (scores.masked_fill(~causal(q, k), -math.inf) + of_keys(m, number)).softmax(-1) @ v


def by_chunks(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    chunks = torch.arange(S) // 4
    scores = (q @ k.mT).masked_fill(chunks[:, None] != chunks, -math.inf)
    return (scores + of_keys(m, number)).softmax(-1) @ v


def in_documents(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    ids = torch.roll(m, 1, 1).cumsum(1) // 4
    scores = (q @ k.mT).masked_fill(ids[:, None, :, None] != ids[:, None, None, :], -math.inf)
    return (scores + of_keys(m, number)).softmax(-1) @ v


def in_torch(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    mask = torch.where(causal(q, k), 0.0, -math.inf).to(q.dtype) + of_keys(m, number)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


ROUNDED = "documents rounded_by"
MODELS: dict[Callable[..., Tensor], list[str]] = {
    bidirectional: ["documents fill"],
    behind_minus_infinity: ["causal key_padding", f"causal {ROUNDED}"],
    behind_the_same_number: ["causal key_padding", f"causal {ROUNDED}", "documents key_padding"],
    in_front_of_the_same_number: ["causal key_padding", "documents key_padding", "documents key_padding rounded_by"],
    times_a_triangle: ["causal documents fill"],
    under_a_cap: ["causal key_padding", f"causal {ROUNDED}"],
    replaced_behind_minus_infinity: ["causal key_padding", "documents key_padding"],
    replaced_in_front_of_minus_infinity: ["causal key_padding", "causal documents"],
    with_slopes: ["causal key_padding + alibi", f"causal {ROUNDED} + alibi"],
    by_chunks: ["chunk=4 key_padding", f"chunk=4 {ROUNDED}"],
    in_documents: ["documents key_padding", ROUNDED],
    in_torch: ["causal key_padding", f"causal {ROUNDED}"],
}


@pytest.mark.thinned(25)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_every_number(model: Callable[..., Tensor], number: float) -> None:
    """`rewrite` compares outputs and gradients with the plain model's, rows without keys among them."""
    found = rewrite(lambda q, k, v, m: model(q, k, v, m, number), (*qkv(), VALID))
    wanted = MODELS[model]
    if model in (bidirectional, times_a_triangle) and number <= -1e30:  # then such rows are a mean
        wanted = [wanted[0].replace("documents fill", "key_padding")]
    assert [mask.replace(f"={number}", "") for mask in found.masks] == wanted
    assert set(found.codes) <= {"SPR207"}
    assert (S, S) not in {size[-2:] for size in found.sizes()}


def layers(model: Callable[..., Tensor], number: float) -> Layers:
    return Layers(lambda q, k, v, m: model(q, k, v, m, number), N, size=0.1)


SPLIT = [
    (behind_the_same_number, {"cp": 2}),
    (with_slopes, {"tp": 2}),
    (under_a_cap, {"dp": 3}),
    (in_front_of_the_same_number, {"cp": 2, "tp": 2}),
]


@pytest.mark.thinned(27)
@pytest.mark.parametrize(("model", "mesh"), SPLIT)
def test_every_gradient_on_all_ranks(model: Callable[..., Any], mesh: dict[str, int]) -> None:
    torch.manual_seed(1)
    x_BSD = torch.randn(B, S, N * H, dtype=torch.float64)
    report = verify(layers(model, -1e9), {"x_BSD": x_BSD, "given": VALID}, mesh=mesh)
    assert report.ok, str(report)


def of_floats(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    """Numbers that only run time tells."""
    scores = (q @ k.mT).masked_fill(~causal(q, k), -math.inf)
    return (scores + (1.0 - m[:, None, None, :]) * number).softmax(-1) @ v


def of_floats_times_a_triangle(q: Tensor, k: Tensor, v: Tensor, m: Tensor, number: float) -> Tensor:
    return (q @ k.mT + (1.0 - m[:, None, None, :] * causal(q, k)) * number).softmax(-1) @ v


@pytest.mark.thinned(4)
@pytest.mark.parametrize("number", [-1e4, -1e30, LOWEST])
@pytest.mark.parametrize("model", [of_floats, of_floats_times_a_triangle], ids=lambda f: f.__name__)
def test_numbers_that_only_run_time_tells(model: Callable[..., Tensor], number: float) -> None:
    """Scores that -1e4 is added to are rounded to 2e-12 in the plain model, and are not here."""
    inputs = (*qkv(), VALID.double())
    found = rewrite(lambda q, k, v, m: model(q, k, v, m, number), inputs, tolerance=1e-11)
    assert "SPR201" in found.codes


@pytest.mark.thinned(4)
def test_a_mask_of_floats_where_each_rank_has_one_row() -> None:
    torch.manual_seed(1)
    x_BSD = torch.randn(B, S, N * H, dtype=torch.float64)
    report = verify(layers(of_floats, -1e30), {"x_BSD": x_BSD, "given": VALID.double()}, mesh={"dp": B})
    assert report.ok, str(report)


def test_attentions_share_what_is_made_of_one_bias() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        for _ in range(3):
            v = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return v

    found = rewrite(model, (*qkv(), torch.randn(B, 1, S, S, dtype=torch.float64)))
    assert len(found.attentions) == 6
    assert len(found.graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)) == 1


def test_learned_biases_have_their_gradient_in_rows_without_keys() -> None:
    bias = torch.randn(1, N, S, S, dtype=torch.float64, requires_grad=True)

    def model(q: Tensor, k: Tensor, v: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias + of_keys(m, LOWEST)).softmax(-1) @ v

    found = rewrite(model, (*qkv(), VALID, bias))
    assert found.masks == [f"documents fill={LOWEST} + bias"]


def test_small_numbers_in_a_buffer_need_no_second_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.randn(1, N, S, S, dtype=torch.float64))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT + self.bias).softmax(-1) @ v

    assert rewrite(Model(), qkv()).masks == ["full + bias"]


def test_scaled_integers() -> None:
    """Factors times integers of data: compared exactly, and nothing that is rounded past a small integer."""
    m = Scaled(1.0, read("m"))
    assert m * -2.0 + 2.0 == Scaled(-2.0, read("m") - 1)
    assert str((-m + 1.0).compare("gt", 0.5)) == str((m).compare("lt", 0.5))
    for unreadable in (lambda: m + 0.5, lambda: m * math.inf, lambda: m.compare("lt", 1e9)):
        with pytest.raises(Unreadable):
            unreadable()


def read(name: str) -> Element:
    return Element(sympy.core.symbol.Str(name), index_symbol("k"))
