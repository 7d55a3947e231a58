"""recognize-attention: what happens to scores: softcap, sinks, row maxima, finite fills, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recognition import qkv, rewrite, run_passes
from score_graphs import capped, causal, lowest_unless
from torch import Tensor

from spcompile.attention.scores.dropout import Dropout
from spcompile.capture.retrace import capture

sdpa = F.scaled_dot_product_attention


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(capped(q @ k.mT * 0.7).masked_fill(~causal(q, k), -math.inf), -1) @ v


def softcap_of_the_other_sign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.mT * 0.2) * -3 + torch.where(causal(q, k), 0.0, -math.inf), -1) @ v


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("model", "cap", "scale"), [(softcap, 5, 0.7), (softcap_of_the_other_sign, 3, -0.6)])
def test_softcap(model: Callable[..., Any], cap: float, scale: float) -> None:
    found = rewrite(model, qkv())
    assert str(found.mask) == "causal"
    node = found.attentions[0]
    assert node.args[14] == cap
    assert node.args[10] == pytest.approx(scale)


@pytest.mark.parametrize("number", [0, 1.5, -3])
def test_a_number_added_to_all_scores_is_nothing_to_a_softmax(number: float) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.5 + number).masked_fill(~causal(q, k), -math.inf) - number
        return scores.softmax(-1) @ v

    assert str(rewrite(model, qkv()).mask) == "causal"


def test_a_bias_that_is_subtracted() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).to(q.dtype)
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)[:, None, None]
        return (q @ k.mT * 0.5 - slopes * distance).masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v

    assert rewrite(model, qkv()).masks == ["causal + alibi"]


def column(sinks: Tensor, scores: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)


def sinks_as_the_last_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.5).masked_fill(~causal(q, k), -math.inf)
    scores = torch.cat([scores, column(sinks, scores)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, -1, dtype=scores.dtype)[..., :-1].to(v.dtype) @ v


def sinks_as_the_first_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = capped(q @ k.mT * 0.5).masked_fill(~causal(q, k), -math.inf)
    scores = torch.cat([sinks[:, None, None].to(q.dtype).expand(q.shape[0], -1, q.shape[2], 1), scores], dim=3)
    scores = scores - scores.detach().amax(-1, keepdim=True)
    return scores.softmax(-1).narrow(-1, 1, k.shape[2]) @ v


@pytest.mark.parametrize("model", [sinks_as_the_last_column, sinks_as_the_first_column])
def test_sinks(model: Callable[..., Any]) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 4.0], dtype=torch.float64).requires_grad_()
    found = rewrite(model, (*qkv(), sinks))
    assert str(found.mask) == "causal"
    assert found.attentions[0].args[12].meta["val"].shape == (4,)  # type: ignore[union-attr]


def test_a_row_maximum_below_the_sinks_is_kept() -> None:
    """A softmax does not see the maximum of the joined scores; that of the scores alone it would."""

    def model(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = q @ k.mT
        scores = scores - scores.amax(-1, keepdim=True)
        return torch.cat([scores, column(sinks, scores)], -1).softmax(-1)[..., :-1] @ v

    found = rewrite(model, (*qkv(), torch.ones(4, dtype=torch.float64).requires_grad_()))
    assert found.rewrites == (0, 0)


def test_a_row_maximum() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~causal(q, k), -math.inf)
        return (scores - scores.max(-1, keepdim=True)[0]).softmax(-1) @ v

    assert str(rewrite(model, qkv()).mask) == "causal"


LENGTHS = torch.tensor([0, 7])


def of_lengths(k: Tensor, lengths: Tensor) -> Tensor:
    """The last keys of each sequence, all of none of the first: under a causal mask some rows have no key."""
    return (torch.arange(k.shape[2]) >= k.shape[2] - lengths[:, None])[:, None, None, :]


def filled(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = of_lengths(k, lengths) & causal(q, k)
    return (q @ k.mT * 0.3).masked_fill(~keep, torch.finfo(q.dtype).min).softmax(-1) @ v


def filled_behind_a_cap_and_a_bias(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = of_lengths(k, lengths) & causal(q, k)
    scores = capped(q @ k.mT * 0.3) + torch.arange(k.shape[2], dtype=q.dtype)
    return torch.where(keep, scores, -1e9).softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """With one number: a row without keys holds it throughout, as with one mask."""
    scores = (q @ k.mT * 0.3).masked_fill(~of_lengths(k, lengths), -1e4)
    return scores.masked_fill(~causal(q, k), -1e4).softmax(-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    keep = of_lengths(k, lengths) & causal(q, k)
    return (q @ k.mT * 0.3 + lowest_unless(keep, q.dtype)).softmax(-1) @ v


def added_with_sinks(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    keep = of_lengths(k, lengths) & causal(q, k)
    scores = capped(q @ k.mT) + lowest_unless(keep, q.dtype)
    return torch.cat([scores, column(torch.arange(4.0).to(q.dtype), scores)], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.thinned(4)
@pytest.mark.parametrize("model", [filled, filled_behind_a_cap_and_a_bias, filled_twice, added, added_with_sinks])
def test_rows_without_keys_and_a_finite_fill(model: Callable[..., Any]) -> None:
    """Such rows are uniform over all keys; added to scores, the fill leaves these their gradient."""
    found = rewrite(model, (*qkv(), LENGTHS))
    assert found.masks[0].startswith("causal key_padding")
    assert found.attentions[0].args[8] is None
    assert (12, 12) not in {size[-2:] for size in found.sizes()}


@pytest.mark.parametrize("written_out", [False, True])
def test_dropout(written_out: bool) -> None:
    """The weights that fall are those of the seed; everything else is the plain formula, gradients too."""

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if written_out:
            return F.dropout((q @ k.mT / 6**0.5).masked_fill(~causal(q, k), -math.inf).softmax(-1), 0.4) @ v
        return sdpa(q, k, v, dropout_p=0.4, is_causal=True)

    graphs = []

    def backend(gm: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        captured = capture(gm, examples)
        graphs.append(run_passes(captured))
        return captured.forward

    q, k, v = qkv()
    torch.manual_seed(3)
    out = torch.compile(model, backend=backend, fullgraph=True)(q, k, v)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**32, (2, 4))
    factors = Dropout(0.4, seed).factors(torch.arange(12), torch.arange(12), torch.float64)
    scores = (q @ k.mT / 6**0.5).masked_fill(~causal(q, k), -math.inf)
    expected = (scores.softmax(-1) * factors) @ v
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (found,) = graphs
    assert found.codes == ["SPR303"]
    assert found.masks == ["causal"]
    assert found.attentions[0].args[15] == 0.4


FACTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of scores [2, 4, 12, 12] and f [4, 1, 1]
    "by head": lambda s, f: s * f.exp().clamp(max=100),
    "in front": lambda s, f: f * s * 0.5,
    "divided": lambda s, f: (s * 2.0) / (f.square() + 1),
    "by row": lambda s, f: s * torch.arange(12.0, dtype=s.dtype)[:, None].log1p(),
    "one number": lambda s, f: s * f.mean(),
    "several": lambda s, f: s * f / f.abs().sum(),
    "inside of a cap": lambda s, f: capped(s * f),
    "beside a bias": lambda s, f: s * f - torch.arange(12.0, dtype=s.dtype),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FACTORS)
def test_factors_that_are_no_constants_go_to_the_queries(name: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        return FACTORS[name](q @ k.mT, f).masked_fill(~causal(q, k), -math.inf).softmax(-1) @ v

    found = rewrite(model, (*qkv(), torch.randn(4, 1, 1, dtype=torch.float64, requires_grad=True)))
    assert found.masks[0].startswith("causal")
    assert not found.remarks.rows


@pytest.mark.parametrize("inside", [lambda s: capped(s), lambda s: s - torch.arange(12), lambda s: s + 3.0])
def test_what_stands_inside_of_such_a_factor_is_refused(inside: Callable[[Tensor], Tensor]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        return (inside(q @ k.mT) * f).softmax(-1) @ v

    found = rewrite(model, (*qkv(), torch.randn(4, 1, 1, dtype=torch.float64, requires_grad=True)))
    assert found.codes == ["SPR202"]


def test_a_factor_for_each_key_is_refused() -> None:
    found = rewrite(lambda q, k, v: (q @ k.mT * torch.arange(12.0, dtype=q.dtype)).softmax(-1) @ v, qkv())
    assert found.codes == ["SPR202"]
