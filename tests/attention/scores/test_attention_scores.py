"""Softcap, ALiBi, sinks, dropout and key biases in attention, alone and on a simulated ring, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile.attention.kernels import tiles
from spcompile.attention.op import attention, spec_ring_attention, spec_ring_attention_backward
from spcompile.attention.ring.hops import needed_hops
from spcompile.attention.ring.ring import Ring
from spcompile.attention.scores.dropout import Dropout, first_word
from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask
from spcompile.attention.scores.provider import Scores
from spcompile.diagnostics import IllegalOption
from spcompile.machine import sequence

B, N, G, H, SCALE, P = 2, 4, 2, 6, 0.37, 0.3
FEATURES = ["softcap", "alibi", "sinks", "dropout", "key bias"]
COMBINATIONS = [(name,) for name in FEATURES] + [("softcap", "sinks"), ("alibi", "sinks", "dropout"), tuple(FEATURES)]
MASKS = ["full", "causal", "causal window=5", "causal key_padding"]
FILLED = ["documents fill=-1e+30", "causal window=5 documents fill=-1000000000.0"]
ROUNDED = [
    "rounded_by=-1e+30",
    "causal rounded_by=-1000000000.0",
    "causal window=5 documents key_padding rounded_by=-1.7976931348623157e+308",
]


def problem(features: tuple[str, ...], text: str, S: int, T: int) -> dict[str, Any]:
    torch.manual_seed(S + 100 * T)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    mask = AttentionMask.parse(text)
    documents = torch.randint(0, 3, (B, T), dtype=torch.int32).sort(-1).values if mask.documents else None
    q_documents = documents
    if mask.fill is not None:  # runs of rows that see all keys, and none in one sequence
        q_documents = torch.randint(0, 3, (B, S), dtype=torch.int32).sort(-1).values
        q_documents[1, S // 3 : 2 * S // 3] = WITHOUT_KEYS
    return {
        "q": leaf(B, N, S, H),
        "k": leaf(B, G, T, H),
        "v": leaf(B, G, T, 5),
        "mask": mask,
        "key_valid": torch.rand(B, T) > 0.3 if mask.key_padding else None,
        "documents": documents,
        "q_documents": q_documents,
        "bias": leaf(B, N, 1, T) if "key bias" in features else None,
        "slopes": 2.0 ** -torch.arange(N).double() if "alibi" in features else None,
        "sinks": leaf(N) if "sinks" in features else None,
        "seed": torch.randint(0, 2**32, (B, N)) if "dropout" in features else None,
        "softcap": 1.3 if "softcap" in features else 0.0,
        "grad_out": torch.randn(B, N, S, 5, dtype=torch.float64),
    }


def plain(x: dict[str, Any]) -> Tensor:
    q, k, v = x["q"], *(y.repeat_interleave(N // G, 1) for y in (x["k"], x["v"]))
    rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    scores = q @ k.mT * SCALE
    if x["softcap"]:
        scores = x["softcap"] * torch.tanh(scores / x["softcap"])
    if x["bias"] is not None:
        scores = scores + x["bias"]
    if x["slopes"] is not None:
        scores = scores + x["slopes"][:, None, None] * (columns - rows[:, None])
    if x["mask"].rounded_by is not None:
        scores = (scores + x["mask"].rounded_by) - x["mask"].rounded_by
    if x["mask"].fill is not None:
        is_open = (x["q_documents"] == WITHOUT_KEYS)[:, None, :, None]
        scores = torch.where(is_open, (scores + x["mask"].fill) - x["mask"].fill, scores)
    keep = x["mask"].allowed(rows, columns, x["q_documents"], x["documents"], x["key_valid"])
    empty = ~keep.expand_as(scores).any(-1, keepdim=True)
    scores = torch.where(keep | empty, scores, -torch.inf)
    if x["sinks"] is not None:
        sink = x["sinks"].view(1, N, 1, 1).expand(B, N, q.shape[2], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    if x["seed"] is not None:
        weights = weights * Dropout(P, x["seed"]).factors(rows, columns, torch.float64)
    return (weights @ v).masked_fill(empty, 0)


def differentiable(x: dict[str, Any]) -> list[str]:
    return [name for name in ("q", "k", "v", "bias", "sinks") if x[name] is not None]


def expected(x: dict[str, Any]) -> list[Tensor]:
    out = plain(x)
    return [out.detach(), *torch.autograd.grad(out, [x[name] for name in differentiable(x)], x["grad_out"])]


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda text, i=index: f"result {i}: {text}")


def call(x: dict[str, Any], order: Tensor | None = None) -> Tensor:
    p = P if x["seed"] is not None else 0.0
    data = (order, None, x["q_documents"], x["documents"], x["key_valid"], x["bias"], str(x["mask"]), SCALE)
    out, _ = attention(x["q"], x["k"], x["v"], *data, x["slopes"], x["sinks"], x["seed"], x["softcap"], p)
    return out


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_op(features: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MAX_ROWS", 4)
    for S, T in ((13, 13), (6, 11), (1, 1)):
        x = problem(features, text, S, T)
        out = call(x)
        check([out.detach(), *torch.autograd.grad(out, [x[n] for n in differentiable(x)], x["grad_out"])], expected(x))


@pytest.mark.parametrize("text", FILLED)
@pytest.mark.parametrize("features", [(), ("softcap", "dropout"), ("alibi", "key bias")], ids="+".join)
def test_rows_that_see_all_keys_under_a_fill(
    features: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "MAX_ROWS", 4)
    for S, T in ((13, 13), (6, 11), (1, 1)):
        x = problem(features, text, S, T)
        out = call(x)
        check([out.detach(), *torch.autograd.grad(out, [x[n] for n in differentiable(x)], x["grad_out"])], expected(x))
    for order in sequence.ORDERS:
        x = problem(features, text, 16, 16)
        hops = needed_hops(x["q_documents"], x["documents"], x["mask"], Ring(16, 16, 4, order))
        check(ring_over(x, 4, order), expected(x))
        check(ring_over(x, 4, order, hops), expected(x))


def test_a_fill_without_such_rows_is_none() -> None:
    x = problem((), FILLED[1], 13, 13)
    x["q_documents"] = x["documents"]
    scores = Scores(x["mask"], SCALE, x["documents"], x["documents"])
    assert str(scores.without_idle_conditions().mask) == "causal window=5 documents"
    check([call(x).detach()], expected(x)[:1])


def test_ids_that_a_kernel_would_number_anew_are_refused_with_a_fill() -> None:
    x = problem((), FILLED[0], 4, 4)
    x["q_documents"] = x["q_documents"].long()
    with pytest.raises(IllegalOption, match="int32"):
        call(x)


@pytest.mark.parametrize("text", ROUNDED)
@pytest.mark.parametrize("features", [(), ("softcap",), ("dropout",), ("alibi", "key bias")], ids="+".join)
def test_rounded_scores(features: tuple[str, ...], text: str) -> None:
    """The weights are those that the rounded sums have left, and gradients those of a softmax over the scores."""
    for S, T in ((13, 13), (6, 11)):
        if S == T or "documents" not in text:
            x = problem(features, text, S, T)
            out = call(x)
            grads = torch.autograd.grad(out, [x[n] for n in differentiable(x)], x["grad_out"])
            check([out.detach(), *grads], expected(x))
    for order in sequence.ORDERS:
        x = problem(features, text, 16, 16)
        check(ring_over(x, 4, order), expected(x))


def test_rounded_scores_have_no_sinks() -> None:
    with pytest.raises(IllegalOption, match="without sinks"):
        call(problem(("sinks",), "rounded_by=-1e+30", 4, 4))


@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_any_order_of_the_rows(features: tuple[str, ...]) -> None:
    x = problem(features, "causal", 13, 13)
    order = torch.randperm(13)
    wanted = expected(x)
    rows = {**x, "q": x["q"].detach()[:, :, order].requires_grad_()}
    out = call(rows, order.int())
    grads = torch.autograd.grad(out, [rows[n] for n in differentiable(x)], x["grad_out"][:, :, order])
    check([out.detach(), *grads], [wanted[0][:, :, order], wanted[1][:, :, order], *wanted[2:]])


@pytest.mark.thinned(4, covers=["order", "text", "features"])
@pytest.mark.parametrize("order", sequence.ORDERS)
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_ring(features: tuple[str, ...], text: str, order: str) -> None:
    """The same mask of dropout on any number of ranks; gradients of sinks and key biases are sums over ranks."""
    for degree, S, T in ((2, 13, 13), (3, 7, 16), (4, 16, 16)):
        x = problem(features, text, S, T)
        check(ring_over(x, degree, order), expected(x))


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("order", sequence.ORDERS)
def test_everything_in_one_ring(order: str, asks: bool) -> None:
    """Softcap, a window, documents, sinks and either order of the sequence together, and all else on top."""
    text = "causal window=7 documents key_padding"
    for features in (("softcap", "sinks"), tuple(FEATURES)):
        for degree, length in ((4, 33), (8, 40)):
            x = problem(features, text, length, length)
            hops = needed_hops(x["documents"], x["documents"], x["mask"], Ring(length, length, degree, order))
            check(ring_over(x, degree, order, hops if asks else None), expected(x))


def ring_over(x: dict[str, Any], degree: int, order: str, hops: Tensor | None = None) -> list[Tensor]:
    """As `expected`, from a simulated ring."""
    S, T = x["q"].shape[2], x["k"].shape[2]

    def shards(name: str) -> list[Tensor]:
        return [sequence.take(x[name].detach(), 2, r, degree, order, torch.nan) for r in range(degree)]

    q, k, v, grad_out = (shards(name) for name in ("q", "k", "v", "grad_out"))
    bias, sinks = (None if x[name] is None else x[name].detach() for name in ("bias", "sinks"))
    more = (x["slopes"], sinks, x["seed"], x["softcap"], P if x["seed"] is not None else 0.0)
    documents = x["q_documents"], x["documents"]
    data = (*documents, x["key_valid"], bias, str(x["mask"]), SCALE, S, T, "cp", degree, order)
    last = (1, hops)
    calls = [(q[r], k[r], v[r], *data, *more, *last) for r in range(degree)]
    results = spec_ring_attention(calls)
    backward = spec_ring_attention_backward(
        [(grad_out[r], None, *results[r], *calls[r][:14], True, *more, True, *last) for r in range(degree)]
    )
    found = [sequence.restore_all([out for out, _ in results], 2, S, order)]
    grads = [*zip(*backward, strict=True)]
    found += [sequence.restore_all(grads[i], 2, n, order) for i, n in enumerate((S, T, T))]
    found += [torch.stack(grads[i]).sum(0) for i, name in ((3, "bias"), (4, "sinks")) if x[name] is not None]
    return found


@pytest.mark.thinned(2)
def test_opcheck() -> None:
    x = problem(tuple(FEATURES), "causal", 6, 6)
    data = (None, None, None, None, None, x["bias"], "causal", SCALE)
    torch.library.opcheck(
        attention, (x["q"], x["k"], x["v"], *data, x["slopes"], x["sinks"], x["seed"], x["softcap"], P)
    )


def test_slopes_have_no_gradient() -> None:
    x = problem(("alibi",), "causal", 4, 4)
    x["slopes"].requires_grad_()
    with pytest.raises(NotImplementedError):
        call(x).sum().backward()


@pytest.mark.parametrize("features", [("sinks",), ("dropout", "softcap"), ("alibi",)], ids="+".join)
def test_bfloat16_is_as_exact_as_its_inputs(features: tuple[str, ...]) -> None:
    x = problem(features, "causal", 64, 64)
    for name in ("q", "k", "v"):
        x[name] = x[name].detach().bfloat16().double().requires_grad_()
    exact = expected(x)[0]
    low = {**x, **{name: x[name].detach().bfloat16() for name in ("q", "k", "v")}}
    low |= {name: None if x[name] is None else x[name].detach().float() for name in ("slopes", "sinks")}
    assert float((call(low).double() - exact).abs().max() / exact.abs().max()) <= 2**-8


class TestDropout:
    def test_known_answers(self) -> None:
        """The vectors of Random123 for Philox2x32 with seven rounds."""
        for low, high, key, word in (
            (0, 0, 0, 0x257A3673),
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xAB302C4D),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0xBEDBBE6B),
        ):
            assert int(first_word(*map(torch.tensor, (low, high, key)))) == word

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_share_and_independence(self, p: float) -> None:
        """Shares of heads, rows and columns, and of pairs of neighbours, within five standard deviations."""
        side = 512
        factors = Dropout(p, torch.tensor([[1, 2], [3, 2**31]])).factors(
            torch.arange(side), torch.arange(side), torch.double
        )
        fell = (factors == 0).double()
        assert set(factors.unique().tolist()) == {0.0, float(torch.tensor(1.0).double() / (1 - p))}

        def within(x: Tensor, share: float) -> bool:
            return bool(((x.mean(-1) - share).abs() < 5 * (share * (1 - share) / x.shape[-1]) ** 0.5).all())

        assert all(within(x, p) for x in (fell.flatten(2), fell, fell.mT))
        for a, b in (
            (fell[..., 1:], fell[..., :-1]),
            (fell[:, :, 1:], fell[:, :, :-1]),
            (fell[:, :1], fell[:, 1:]),
            (fell[:1], fell[1:]),
        ):
            assert within((a * b).flatten(), p * p)

    def test_large_positions(self) -> None:
        far = torch.tensor([2**31 - 2, 2**31 - 1], dtype=torch.int32)
        seed = torch.tensor([[7]])
        rows = Dropout(0.5, seed).factors(far, torch.arange(64), torch.double)
        assert not torch.equal(rows[:, :, 0], rows[:, :, 1])

    def test_illegal_p(self) -> None:
        for p in (-0.1, 1.0, 1.5):
            with pytest.raises(IllegalOption):
                Dropout(p, torch.zeros(1, 1))
