"""Which kernel takes which attention on a GPU, and that PyTorch's are called as their schemas and shapes want it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile.attention.kernels import naive, whole_rows
from spcompile.attention.kernels.choice import TABLE, Wanted, kernels_for
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.provider import Rows, Scores
from spcompile.attention.scores.runs import Run, natural_runs

PLAIN = Wanted(90, torch.bfloat16, 128, 128, AttentionMask(causal=True), True, False, True, 0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["cudnn", "flash", "triton", "tiles"]),
        ({"mask": AttentionMask(), "square": False}, ["cudnn", "flash", "triton", "tiles"]),
        ({"capability": 80}, ["flash", "triton", "tiles"]),
        ({"capability": 89}, ["flash", "tiles"]),
        ({"capability": 89, "mask": AttentionMask(documents=True)}, ["tiles"]),
        ({"capability": 75}, ["tiles"]),
        ({"head_size": 192}, ["triton", "tiles"]),
        ({"head_size": 256, "v_size": 256}, ["flash", "triton", "tiles"]),
        ({"head_size": 257, "v_size": 257}, ["tiles"]),
        ({"head_size": 100, "v_size": 100}, ["triton", "tiles"]),
        ({"square": False}, ["triton", "tiles"]),
        ({"in_hops": True}, ["triton", "tiles"]),
        ({"is_plain": False}, ["triton", "tiles"]),
        ({"mask": AttentionMask(causal=True, window=9)}, ["triton", "tiles"]),
        ({"mask": AttentionMask(causal=True, offset=1)}, ["triton", "tiles"]),
        ({"dtype": torch.float32}, ["triton", "tiles"]),
        ({"dtype": torch.float64}, ["tiles"]),
        ({"scale": -1.0, "in_hops": True}, ["tiles"]),
    ],
)
def test_the_table(changes: dict[str, Any], expected: list[str]) -> None:
    assert [row.name for row in kernels_for(replace(PLAIN, **changes))] == expected


def test_every_kernel_says_what_it_takes() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert all(row.takes for row in TABLE)


def wanted(q_runs: Any, k_runs: Any, S: int = 8, **scores: Any) -> Wanted:
    q, k = torch.empty(1, 2, S, 16), torch.empty(1, 1, 8, 16)
    return whole_rows.wanted_of(q, k, k, q_runs, k_runs, Scores(AttentionMask(causal=True), 0.1, **scores), 90)


def test_what_is_asked_of_an_attention() -> None:
    natural = natural_runs(8)
    assert wanted(natural, natural) == replace(PLAIN, dtype=torch.float32, head_size=16, v_size=16)
    assert wanted((Run(0, 8, 8, 15),), natural).in_hops
    assert wanted(natural, (Run(0, 6, 0, 5),)).in_hops
    assert wanted((Run(0, 4, 0, 3), Run(4, 4, 12, 15)), natural).in_hops
    assert not wanted(natural_runs(4), natural, S=4).square
    for more in ({"softcap": 2.0}, {"sinks": torch.zeros(2)}, {"alibi_slopes": torch.zeros(2)}):
        assert not wanted(natural, natural, **more).is_plain


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_calls_fit_the_schemas_and_the_shapes(kernel: str) -> None:
    """Under fake CUDA tensors, with key heads that are shared and gradients that are expanded."""
    with FakeTensorMode():
        q = torch.empty(2, 64, 4, 32, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        k = torch.empty(2, 2, 64, 32, dtype=torch.bfloat16, device="cuda")
        scores = Scores(AttentionMask(causal=True), 0.1)
        out, lse = whole_rows.forward(kernel, q, k, k, scores)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        grad_out = torch.empty((), dtype=torch.bfloat16, device="cuda").expand(out.shape)
        found = whole_rows.backward(kernel, Rows(q, out, grad_out, lse, None), k, k, scores)
        for x, like in zip(found, (q, k, k), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, like.dtype, like.device)


def test_on_cpus_none_of_them_is_asked() -> None:
    x = torch.empty(1, 1, 8, 16, dtype=torch.bfloat16)
    runs = natural_runs(8)
    assert whole_rows.torch_kernel(x, x, x, runs, runs, Scores(AttentionMask(), 0.1)) is None


def test_lse_and_out_of_one_kernel_serve_the_backward_of_another() -> None:
    """Where lse has a gradient, ours takes over: what both read is the same function of q and k."""
    q, k = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(2))
    out, lse = naive.forward(q, k, k, 0.5, None)
    assert torch.allclose(lse, (q @ k.mT * 0.5).logsumexp(-1))
    assert torch.allclose(out, (q @ k.mT * 0.5).softmax(-1) @ k)


def as_reference(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """PyTorch's kernels are there, and are dense arithmetic."""
    called: list[str] = []

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        keep = AttentionMask(causal=causal).allowed(torch.arange(q.shape[2]), torch.arange(k.shape[2]))
        return naive.forward(q, k, v, scale, keep)

    class Kernels:
        def _scaled_dot_product_flash_attention(self, q, k, v, p, causal, debug, *, scale):  # type: ignore[no-untyped-def]
            called.append("flash")
            return (*dense(q, k, v, causal, scale), None)

    monkeypatch.setattr(whole_rows, "aten", Kernels())
    return called


def test_the_forward_returns_what_the_kernel_found(monkeypatch: pytest.MonkeyPatch) -> None:
    called = as_reference(monkeypatch)
    q, k = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(2))
    out, lse = whole_rows.forward("flash", q, k, k, Scores(AttentionMask(causal=True), 0.5))
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.mT * 0.5).masked_fill(~keep, -torch.inf)
    assert called == ["flash"]
    assert torch.allclose(out, scores.softmax(-1) @ k)
    assert torch.allclose(lse, scores.logsumexp(-1))
