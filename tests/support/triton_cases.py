"""One call of attention by the Triton kernels on CPU tensors, and what `naive` says of it in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from spcompile.attention.kernels import naive
from spcompile.attention.kernels.triton.configs import Config, Configs
from spcompile.attention.kernels.triton.hop_provider import Triton
from spcompile.attention.scores.dropout import Dropout
from spcompile.attention.scores.mask import WITHOUT_KEYS, AttentionMask
from spcompile.attention.scores.provider import Rounding, Rows, Scores
from spcompile.attention.scores.runs import Run

ROUNDINGS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}  # of the largest number, in units of eps
TILES = [Config(16, 16, 4, 1), Config(32, 16, 4, 1), Config(16, 32, 4, 1)]


@dataclass
class Case:
    """One call of attention: q_order and k_order say which position each row and key has; -1 is padding."""

    dtype: torch.dtype
    mask: AttentionMask
    B: int
    G: int
    group: int
    S: int
    T: int
    H: int
    V: int
    hops: int = 1
    order: str = "natural"
    bias: str = "none"
    bias_shape: tuple[bool, bool, bool] = (True, True, True)  # whether batch, heads and rows have their own
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout: float = 0.0
    tiles: Config = TILES[0]
    described: bool = False
    seed: int = 0


def order_of(kind: str, length: int, random: torch.Generator) -> Tensor:
    """Positions of `length` local elements."""
    if kind == "shuffled":
        return torch.randperm(length, generator=random)
    if kind == "padded":  # two chunks of a zigzag, the second one cut short
        half = (length + 1) // 2
        positions = torch.cat([torch.arange(half), torch.arange(length - half) + half + 7])
        positions[length - length // 4 :] = -1
        return positions
    return torch.arange(length)


def runs_from(positions: Tensor) -> list[Run]:
    """One run for each element if they are shuffled, else the maximal ones."""
    runs: list[Run] = []
    for index, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        if runs and runs[-1].last + 1 == position and runs[-1].stop == index:
            start, length, first = runs[-1].start, runs[-1].length, runs[-1].first
            runs[-1] = Run(start, length + 1, first, position)
        else:
            runs.append(Run(index, 1, position, position))
    return runs


def check(case: Case) -> None:
    """Outputs and every gradient, hop by hop, against the dense attention."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(case.dtype)

    B, G, S, T, H, V = case.B, case.G, case.S, case.T, case.H, case.V
    N = G * case.group
    q, k, v, grad_out = normal(B, N, S, H), normal(B, G, T, H), normal(B, G, T, V), normal(B, N, S, V)
    grad_lse = torch.randn(B, N, S, generator=random)
    q_at, k_at = order_of(case.order, S, random), order_of(case.order, T, random)
    Sg, Tg = max(int(q_at.max()) + 1, 1), max(int(k_at.max()) + 1, 1)
    q_documents = k_documents = key_valid = None
    if case.mask.documents:
        q_documents, k_documents = (torch.randint(0, 3, (B, n), generator=random).sort(-1).values for n in (Sg, Tg))
        if case.mask.fill is not None:
            k_documents = k_documents.int()
            q_documents = q_documents.int().masked_fill(torch.rand(B, Sg, generator=random) < 0.3, WITHOUT_KEYS)
        elif case.seed % 2:  # pairs of ids, of which int32 holds the second
            q_documents, k_documents = (ids * 2**32 + 5 for ids in (q_documents, k_documents))
    if case.mask.key_padding:
        key_valid = torch.rand(B, Tg, generator=random) > 0.3
    bias = None
    own = [n if has else 1 for n, has in zip((B, N, S), case.bias_shape, strict=True)]
    if case.bias == "added":
        bias = normal(*own, Tg)
    elif case.bias == "kept":
        bias = torch.rand(*own, Tg, generator=random) > 0.3
    slopes = 2.0 ** -torch.arange(1, N + 1) if case.alibi else None
    sinks = torch.randn(N, generator=random) if case.sinks else None
    dropout = None
    if case.dropout:
        dropout = Dropout(case.dropout, torch.randint(-(2**62), 2**62, (B, N), generator=random))
    scale = H**-0.5
    scores = Scores(case.mask, scale, q_documents, k_documents, key_valid, bias, case.softcap, slopes, sinks, dropout)

    # What is expected, dense in float64.
    valid_q, valid_k = q_at >= 0, k_at >= 0
    q_place, k_place = q_at.clamp(min=0), k_at.clamp(min=0)
    keep = case.mask.allowed(
        q_place,
        k_place,
        None if q_documents is None else q_documents[:, q_place],
        None if k_documents is None else k_documents[:, k_place],
        None if key_valid is None else key_valid[:, k_place],
    )
    keep = keep & valid_q[:, None] & valid_k
    added = None
    if bias is not None and case.bias == "kept":
        keep = keep & bias[..., k_place]
    elif bias is not None:
        added = bias[..., k_place].double()
    if slopes is not None:
        alibi = slopes.double()[:, None, None] * (k_place - q_place[:, None])
        added = alibi if added is None else added + alibi
    factors = None if dropout is None else dropout.factors(q_place, k_place, torch.float64)
    rounding = None if case.mask.rounded_by is None else Rounding(case.mask.rounded_by, None)
    if case.mask.fill is not None:
        assert q_documents is not None
        rounding = Rounding(case.mask.fill, (q_documents[:, q_place] == WITHOUT_KEYS)[:, None, :, None])
    wide = [x.double() for x in (q, k, v)]
    out, lse = naive.forward(*wide, scale, keep, added, case.softcap, factors, rounding)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
        out, lse = out * (lse - total).exp()[..., None], total
    grad_lse = grad_lse.masked_fill(lse.isinf(), 0)

    # What the kernels give, hop by hop.
    tiles = case.tiles._replace(tma=case.described)
    provider = Triton(lambda *_: Configs(tiles, tiles, tiles, tiles))
    assert provider.supports_hops(q, k, v, scores)
    q_runs = runs_from(q_at)
    bounds = list(pairwise(torch.linspace(0, T, case.hops + 1).long().tolist()))
    hops = [(k[:, :, a:b], v[:, :, a:b], q_runs, runs_from(k_at[a:b])) for a, b in bounds]
    state = provider.start_forward(q, v, scores)
    for hop in hops:
        state.add(*hop, last=hop is hops[-1])
    found_out, found_lse = state.result()
    rows = Rows(q, found_out, grad_out, found_lse, grad_lse)
    if case.hops == 1:
        (found_dq, found_dk, found_dv), grad_bias = provider.backward(rows, *hops[0], scores, True)
    else:
        gradients = provider.start_backward(rows, v, scores, True)
        found_dk, found_dv = (
            torch.cat(x, 2) for x in zip(*(gradients.add(*hop, last=hop is hops[-1]) for hop in hops), strict=True)
        )
        found_dq, grad_bias = gradients.result()

    assert found_out.dtype == found_dq.dtype == case.dtype
    close("out", found_out, out, case.dtype)
    close("lse", found_lse, lse, torch.float32)
    delta = (found_out.double() * grad_out.double()).sum(-1) - grad_lse.double()  # of the out that was rounded
    dq, dk, dv, grad_scores = naive.backward(
        *wide, grad_out.double(), lse, delta, scale, keep, added, case.softcap, factors, rounding
    )
    close("dq", found_dq, dq, case.dtype)
    close("dk", found_dk, dk, case.dtype)
    close("dv", found_dv, dv, case.dtype)
    assert (grad_bias is not None) == (case.bias == "added")
    if grad_bias is not None:
        expected = torch.zeros(B, N, S, Tg, dtype=torch.float64)
        expected.index_add_(3, k_place, grad_scores.masked_fill(~keep, 0))
        for dim in range(3):
            if grad_bias.shape[dim] == 1:
                expected = expected.sum(dim, keepdim=True)
        close("grad_bias", grad_bias, expected, case.dtype)


def close(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal where infinite; else no further apart than a few roundings of the largest number, never NaN."""
    finite = expected.isfinite()
    assert torch.equal(found[~finite].double(), expected[~finite]), f"{name}: infinite elsewhere"
    if not finite.any():
        return
    allowed = ROUNDINGS[dtype] * torch.finfo(dtype).eps * max(1.0, float(expected[finite].abs().max()))
    error = float((found[finite].double() - expected[finite]).abs().max())
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
