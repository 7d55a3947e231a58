"""Attention kernels on one device: naive, tiled and aten providers, and blocks over any order, against plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spcompile.attention.kernels import blocks, naive, tiles
from spcompile.attention.kernels.blocks import plan
from spcompile.attention.kernels.cpu_flash import CpuFlash
from spcompile.attention.kernels.tiles import Tiled
from spcompile.attention.op import attention
from spcompile.attention.scores.mask import AttentionMask, Kind
from spcompile.attention.scores.provider import Provider, Rows, Scores
from spcompile.attention.scores.runs import natural_runs, runs_of, shard_runs

SCALE = 0.37
MASKS = [
    "full",
    "causal",
    "causal offset=3",
    "causal offset=-2",
    "causal window=5",
    "window=4 window_right=3",
    "causal chunk=6",
    "causal prefix=4",
    "causal documents",
    "documents key_padding",
    "causal key_padding window=7",
]


@dataclass
class Case:
    """Inputs of attention in float64, with the dense mask that the definition gives."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: AttentionMask
    keep: Tensor
    q_documents: Tensor | None
    k_documents: Tensor | None
    key_valid: Tensor | None
    bias: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor

    @property
    def scores(self) -> Scores:
        return Scores(self.mask, SCALE, self.q_documents, self.k_documents, self.key_valid, self.bias)


def make_case(text: str, S: int = 13, T: int = 13, V: int = 8, bias: str | None = None) -> Case:
    torch.manual_seed(0)
    B, N, G, H = 2, 4, 2, 8
    mask = AttentionMask.parse(text)
    q, k, v = (torch.randn(B, n, s, d, dtype=torch.float64) for n, s, d in ((N, S, H), (G, T, H), (G, T, V)))
    documents = [torch.randint(0, 3, (B, n)).sort(-1).values if mask.documents else None for n in (S, T)]
    key_valid = torch.rand(B, T) > 0.3 if mask.key_padding else None
    keep = mask.allowed(torch.arange(S), torch.arange(T), documents[0], documents[1], key_valid)
    dense = None
    if bias == "float":
        dense = torch.randn(1, N, S, T, dtype=torch.float64)
    elif bias == "bool":
        dense = torch.rand(B, 1, S, T) > 0.3
    grad_out, grad_lse = torch.randn(B, N, S, V, dtype=torch.float64), torch.randn(B, N, S, dtype=torch.float64)
    return Case(q, k, v, mask, keep, *documents, key_valid, dense, grad_out, grad_lse)


def oracle(case: Case, with_lse: bool = False) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv(, dbias) from torch's autograd on a repeated k and v; rows without keys count as zero."""
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = leaves
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * SCALE
    keep = case.keep
    if case.bias is not None and case.bias.is_floating_point():
        leaves.append(case.bias.clone().requires_grad_())
        scores = scores + leaves[-1]
    elif case.bias is not None:
        keep = keep & case.bias
    empty = ~keep.expand_as(scores).any(-1)
    scores = torch.where(keep | empty[..., None], scores, -torch.inf)
    out = (scores.softmax(-1) @ v).masked_fill(empty[..., None], 0)
    lse = scores.logsumexp(-1)
    loss = (out * case.grad_out).sum()
    if with_lse:
        loss = loss + (lse * case.grad_lse).masked_fill(empty, 0).sum()
    return out.detach(), lse.detach().masked_fill(empty, -torch.inf), *torch.autograd.grad(loss, leaves)


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, i=index: f"result {i}: {text}")


def run_provider(provider: Provider, case: Case, with_lse: bool) -> tuple[Tensor, ...]:
    (block,) = plan(natural_runs(case.q.shape[2]), natural_runs(case.k.shape[2]), case.scores)
    out, lse = provider.block_forward(case.q, case.k, case.v, block, torch.float64)
    rows = Rows(case.q, out, case.grad_out, lse, case.grad_lse.masked_fill(lse.isinf(), 0) if with_lse else None)
    has_grad = case.bias is not None and case.bias.is_floating_point()
    grad_bias = torch.zeros_like(case.bias) if has_grad and case.bias is not None else None
    grads = provider.block_backward(rows, case.k, case.v, block, torch.float64, grad_bias)
    return (out, lse, *grads) if grad_bias is None else (out, lse, *grads, grad_bias)


@pytest.mark.parametrize("bias", [None, "float", "bool"])
@pytest.mark.parametrize("text", MASKS)
def test_naive(text: str, bias: str | None) -> None:
    case = make_case(text, S=11, T=14, V=5, bias=bias)
    keep, added = case.keep, None
    if bias == "bool":
        assert case.bias is not None
        keep = keep & case.bias
    else:
        added = case.bias
    out, lse = naive.forward(case.q, case.k, case.v, SCALE, keep, added)
    delta = (out * case.grad_out).sum(-1)
    *grads, grad_scores = naive.backward(case.q, case.k, case.v, case.grad_out, lse, delta, SCALE, keep, added)
    found = (out, lse, *grads) if added is None else (out, lse, *grads, grad_scores.sum(0, keepdim=True))
    check(found, oracle(case))


def test_naive_against_sdpa() -> None:
    case = make_case("causal")
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE, enable_gqa=True)
    grads = torch.autograd.grad(out, leaves, case.grad_out)
    naive_out, lse = naive.forward(case.q, case.k, case.v, SCALE, case.keep)
    delta = (naive_out * case.grad_out).sum(-1)
    naive_grads = naive.backward(case.q, case.k, case.v, case.grad_out, lse, delta, SCALE, case.keep)[:3]
    check((naive_out, *naive_grads), (out.detach(), *grads))


@pytest.mark.thinned(6)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("bias", [None, "float", "bool"])
@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("provider", [CpuFlash(), Tiled()], ids=lambda provider: provider.name)
def test_providers(
    provider: Provider, text: str, bias: str | None, with_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "MAX_ROWS", 4)
    for S, T, V in ((13, 13, 8), (13, 9, 5), (6, 15, 11)):
        case = make_case(text, S, T, V, bias)
        check(run_provider(provider, case, with_lse), oracle(case, with_lse))


def test_flash_mask_without_gradient_of_the_bias() -> None:
    """A bias that needs no gradient goes through the flash kernel in both directions."""
    case = make_case("causal window=6", bias="float")
    (block,) = plan(natural_runs(13), natural_runs(13), case.scores)
    out, lse = CpuFlash().block_forward(case.q, case.k, case.v, block, torch.float64)
    rows = Rows(case.q, out, case.grad_out, lse, None)
    grads = CpuFlash().block_backward(rows, case.k, case.v, block, torch.float64, None)
    check((out, lse, *grads), oracle(case)[:5])


def test_tile_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MAX_SCORES", 64)
    (block,) = plan(natural_runs(40), natural_runs(40), Scores(AttentionMask(causal=True, window=8), 1.0))
    found = list(tiles.tiles(block, 1, torch.device("cpu")))
    assert sum(tile.q.length for tile in found) == 40
    assert all(tile.keep is not None and tile.keep.numel() <= 64 for tile in found)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [None, "float", "bool"])
@pytest.mark.parametrize("text", MASKS)
def test_any_order(text: str, bias: str | None, seed: int) -> None:
    """spx::attention under random orders of queries and keys: whole permutations, subsets and rotations."""
    case = make_case(text, S=24, T=30, V=5, bias=bias)
    out, lse, *grads = oracle(case, with_lse=True)
    random = torch.Generator().manual_seed(seed)
    if seed == 2:
        q_order, k_order = torch.arange(24).roll(5), torch.arange(30).roll(-7)
    else:
        q_order, k_order = torch.randperm(24, generator=random), torch.randperm(30, generator=random)
    leaves = [case.q[:, :, q_order], case.k[:, :, k_order], case.v[:, :, k_order]]
    leaves = [x.clone().requires_grad_() for x in leaves]
    bias_here = case.bias
    if bias_here is not None:
        bias_here = bias_here[:, :, q_order].clone()
        if bias_here.is_floating_point():
            leaves.append(bias_here.requires_grad_())
    found_out, found_lse = attention(
        *leaves[:3],
        q_order.int(),
        k_order.int(),
        case.q_documents,
        case.k_documents,
        case.key_valid,
        bias_here,
        text,
        SCALE,
    )
    grad_lse = case.grad_lse[:, :, q_order].masked_fill(found_lse.isinf(), 0)
    found_grads = torch.autograd.grad((found_out, found_lse), leaves, (case.grad_out[:, :, q_order], grad_lse))
    expected = [grads[0][:, :, q_order], grads[1][:, :, k_order], grads[2][:, :, k_order]]
    expected += [grad[:, :, q_order] for grad in grads[3:]]
    check((found_out, found_lse, *found_grads), (out[:, :, q_order], lse[:, :, q_order], *expected))


@pytest.mark.parametrize("text", MASKS)
def test_striped_order(text: str) -> None:
    """Positions with gaps (every third row on one rank), more of them than MAX_RUNS."""
    case = make_case(text, S=60, T=60)
    out, lse, *grads = oracle(case)
    dk, dv = torch.zeros_like(case.k), torch.zeros_like(case.v)
    for rank in range(3):
        positions = torch.arange(rank, 60, 3)
        leaves = [x.clone().requires_grad_() for x in (case.q[:, :, positions], case.k, case.v)]
        data = (case.q_documents, case.k_documents, case.key_valid)
        found_out, found_lse = attention(*leaves, positions.int(), None, *data, None, text, SCALE)
        rank_grads = torch.autograd.grad(found_out, leaves, case.grad_out[:, :, positions])
        check(
            (found_out, found_lse, rank_grads[0]),
            (out[:, :, positions], lse[:, :, positions], grads[0][:, :, positions]),
        )
        dk, dv = dk + rank_grads[1], dv + rank_grads[2]
    check((dk, dv), (grads[1], grads[2]))


def test_plans_are_few_large_blocks() -> None:
    causal = Scores(AttentionMask(causal=True), 1.0)
    degree, length = 4, 64

    def kinds(q_rank: int, k_rank: int) -> list[tuple[Kind, int, int]]:
        runs = [shard_runs(length, rank, degree, "zigzag") for rank in (q_rank, k_rank)]
        return [(block.kind, block.q.length, block.k.length) for block in plan(*runs, causal)]

    assert kinds(1, 1) == [(Kind.CAUSAL_DIAGONAL, 16, 16)]
    assert kinds(2, 1) == [(Kind.FULL, 16, 8)]
    assert kinds(1, 2) == [(Kind.FULL, 8, 16)]
    _, runs = runs_of(torch.randperm(50))
    assert [block.kind for block in plan(runs, runs, causal)] == [Kind.CAUSAL_DIAGONAL]
    full = plan(
        shard_runs(length, 0, degree, "zigzag"), shard_runs(length, 3, degree, "zigzag"), Scores(AttentionMask(), 1.0)
    )
    assert [(block.kind, block.q.length, block.k.length) for block in full] == [(Kind.FULL, 16, 16)]


def test_conditions_that_hold_for_all_pairs_cost_nothing() -> None:
    """One document in every row, and no padding, are the plain causal mask; two documents are not."""
    case = make_case("causal documents key_padding")
    assert case.q_documents is not None
    one = case.q_documents[:, :1].expand(-1, 13)
    for row_of_another in (False, True):
        k_documents = one.clone()
        k_documents[1, 4] += row_of_another
        keep = case.mask.allowed(torch.arange(13), torch.arange(13), one, k_documents, torch.ones(2, 13).bool())
        idle = replace(case, q_documents=one, k_documents=k_documents, key_valid=torch.ones(2, 13).bool(), keep=keep)
        (block,) = plan(natural_runs(13), natural_runs(13), idle.scores)
        assert block.kind is (Kind.PARTIAL if row_of_another else Kind.CAUSAL_DIAGONAL)
        check(run_provider(CpuFlash(), idle, True), oracle(idle, True))


def test_rows_without_keys() -> None:
    """Zeros, zero gradients and -inf, never NaN, even where a whole batch entry is masked."""
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    key_valid = torch.tensor([[False] * 6, [True] * 3 + [False] * 3])
    out, lse = attention(q, k, v, None, None, None, None, key_valid, None, "key_padding", 1.0)
    grads = torch.autograd.grad(out.sum() + lse[1].sum(), (q, k, v))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((lse[0] == -torch.inf).all())
    assert all(torch.equal(grad[0], torch.zeros_like(grad[0])) for grad in grads)
    assert all(bool(grad.isfinite().all()) for grad in grads)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any op makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("text", ["causal", "causal window=64", "causal documents"])
def test_no_tensor_grows_with_the_square(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MAX_SCORES", 1 << 14)
    S = 2048
    q, k, v = (torch.randn(1, n, S, 8) for n in (2, 1, 1))
    documents = torch.zeros(1, S, dtype=torch.int64) if "documents" in text else None
    data = (None, None, documents, documents, None, None, text, 1.0)
    with LargestTensor() as largest:
        scores = Scores(AttentionMask.parse(text), 1.0, documents, documents)
        out, lse = blocks.forward(q, k, v, natural_runs(S), natural_runs(S), scores)
        rows = Rows(q, out, torch.ones_like(out), lse, None)
        blocks.backward(rows, k, v, natural_runs(S), natural_runs(S), scores, False)
    assert largest.numel <= q.numel()
    torch.testing.assert_close(out, attention(q, k, v, *data)[0], rtol=0, atol=0)


def test_documents_that_no_query_has_cost_nothing() -> None:
    """As where no row is without keys."""
    case = make_case("causal documents")
    others = replace(case, k_documents=torch.full((1, 13), 7), q_documents=torch.full((2, 13), 3))
    assert plan(natural_runs(13), natural_runs(13), others.scores) == []
    one_row = replace(others, q_documents=torch.full((2, 13), 3).index_fill(1, torch.tensor([4]), 7))
    assert len(plan(natural_runs(13), natural_runs(13), one_row.scores)) == 1
