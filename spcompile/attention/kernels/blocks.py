"""Attention over any order of the sequence: pairs of runs, each given to a kernel, merged without rounding.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v. Nothing here is O(S * T)
but a bias that the caller passed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from spcompile.attention.kernels.cpu_flash import CpuFlash
from spcompile.attention.kernels.naive import accumulation_dtype
from spcompile.attention.kernels.tiles import Tiled
from spcompile.attention.scores.mask import AttentionMask, Kind
from spcompile.attention.scores.provider import Block, Gradients, Provider, Rows, Scores
from spcompile.attention.scores.runs import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PROVIDERS: tuple[Provider, ...] = (CpuFlash(), Tiled())  # best first


def provider_for(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Provider:
    """The first provider that supports the block."""
    return next(provider for provider in PROVIDERS if provider.supports(q, k, v, block))


def plan(q_runs: Sequence[Run], k_runs: Sequence[Run], scores: Scores) -> list[Block]:
    """The blocks that cover every pair the mask allows, few and large.

    Pairs of runs that the mask empties are left out; FULL pairs that are neighbours in memory become one block, and so
    does everything where queries and keys are the same rows under a causal mask (the first step of a zigzag ring).
    """
    scores = scores.without_idle_conditions()
    if scores.share_no_document:
        return []
    if scores.mask == AttentionMask(causal=True) and not scores.depends_on_place and _same_rows(q_runs, k_runs):
        return [_indexed(Kind.CAUSAL_DIAGONAL, (0, q_runs[-1].stop), (0, k_runs[-1].stop), scores)]
    blocks: list[Block] = []
    full: dict[
        tuple[int, int], tuple[int, int]
    ] = {}  # memory span of keys -> that of the query rows which see all of it
    for q in q_runs:
        kinds = [_kind(q, k, scores) for k in k_runs]
        for span in _joined([k for k, kind in zip(k_runs, kinds, strict=True) if kind is Kind.FULL]):
            if span in full and full[span][1] == q.start:
                full[span] = (full[span][0], q.stop)
                continue
            if span in full:
                blocks.append(_indexed(Kind.FULL, full[span], span, scores))
            full[span] = (q.start, q.stop)
        for k, kind in zip(k_runs, kinds, strict=True):
            if kind is Kind.CAUSAL_DIAGONAL:
                blocks.append(_indexed(kind, (q.start, q.stop), (k.start, k.stop), scores))
            elif kind is Kind.PARTIAL:
                blocks.append(Block(kind, q, k, scores))
    return blocks + [_indexed(Kind.FULL, rows, span, scores) for span, rows in full.items()]


def _kind(q: Run, k: Run, scores: Scores) -> Kind:
    kind = scores.mask.classify(q.first, q.last, k.first, k.last)
    if kind is Kind.EMPTY:
        return kind
    has_gaps = q.gaps is not None or k.gaps is not None
    if scores.depends_on_place or (has_gaps and kind is Kind.CAUSAL_DIAGONAL):
        return Kind.PARTIAL
    return kind


def _same_rows(q_runs: Sequence[Run], k_runs: Sequence[Run]) -> bool:
    """Whether q and k are the same positions, ascending, without holes in memory."""
    if not q_runs or any(run.gaps is not None for run in (*q_runs, *k_runs)):
        return False
    places = [(run.start, run.length, run.first) for run in q_runs]
    adjoining = len(_joined(q_runs)) == 1 and q_runs[0].start == 0
    ascending = all(a.last < b.first for a, b in pairwise(q_runs))
    return adjoining and ascending and places == [(run.start, run.length, run.first) for run in k_runs]


def _joined(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """The (start, stop) spans in memory that some runs cover, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for run in runs:
        if spans and spans[-1][1] == run.start:
            spans[-1] = (spans[-1][0], run.stop)
        else:
            spans.append((run.start, run.stop))
    return spans


def _indexed(kind: Kind, q: tuple[int, int], k: tuple[int, int], scores: Scores) -> Block:
    """A block whose mask depends on indices inside it only."""
    rows, keys = (Run(start, stop - start, 0, stop - start - 1) for start, stop in (q, k))
    mask = AttentionMask(causal=kind is Kind.CAUSAL_DIAGONAL, rounded_by=scores.mask.rounded_by)
    return Block(kind, rows, keys, Scores(mask, scores.scale, softcap=scores.softcap))


@dataclass(frozen=True)
class ForwardState:
    """Rows over the keys seen so far: out [B, N, S, V] and lse [B, N, S] in the accumulation dtype."""

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor, v: Tensor, sinks: Tensor | None = None) -> ForwardState:
        """Before the first key. A sink [N] is like a key that was seen, with a value of 0."""
        dtype = accumulation_dtype(q.dtype)
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=dtype)
        return cls(out, lse if sinks is None else lse.copy_(sinks[:, None]))

    def add(self, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> None:
        """Let the rows see some blocks of keys."""
        for block in blocks:
            q_part, k_part, v_part = block_rows(q, block.q), block_rows(k, block.k), block_rows(v, block.k)
            provider = provider_for(q_part, k_part, v_part, block)
            out, lse = provider.block_forward(q_part, k_part, v_part, block, self.out.dtype)
            merge(block_rows(self.out, block.q), block_rows(self.lse, block.q), out, lse)


def block_rows(x: Tensor, run: Run) -> Tensor:
    """The local elements of `run` along dim 2."""
    return x.narrow(2, run.start, run.length)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Join (block_out, block_lse) into (out, lse) in place; -inf means that no key was seen."""
    total = torch.logaddexp(lse, block_lse)
    finite = total.masked_fill(total == -torch.inf, 0)
    out.mul_((lse - finite).exp()[..., None]).addcmul_(block_out, (block_lse - finite).exp()[..., None])
    lse.copy_(total)


@dataclass(frozen=True)
class BackwardState:
    """Gradients over the keys seen so far: dq [B, N, S, H]; grad_bias of the bias's shape, or None if not wanted."""

    dq: Tensor
    grad_bias: Tensor | None

    @classmethod
    def empty(cls, q: Tensor, bias: Tensor | None, wants_grad_bias: bool) -> BackwardState:
        """Before the first key."""
        dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        return cls(dq, cls.empty_grad_bias(q, bias, wants_grad_bias))

    @staticmethod
    def empty_grad_bias(q: Tensor, bias: Tensor | None, wants_grad_bias: bool) -> Tensor | None:
        """Zeros of the bias's shape in the accumulation dtype, where its gradient is wanted and there can be one."""
        if bias is None or not wants_grad_bias or not bias.is_floating_point():
            return None
        return torch.zeros(bias.shape, dtype=accumulation_dtype(q.dtype), device=q.device)

    def add(self, rows: Rows, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """Add some blocks to dq and grad_bias; returns their (dk, dv) in the accumulation dtype."""
        dk, dv = (torch.zeros(x.shape, dtype=self.dq.dtype, device=x.device) for x in (k, v))
        for block in blocks:
            part, k_part, v_part = (
                rows.narrow(block.q.start, block.q.length),
                block_rows(k, block.k),
                block_rows(v, block.k),
            )
            provider = provider_for(part.q, k_part, v_part, block)
            grads = provider.block_backward(part, k_part, v_part, block, self.dq.dtype, self.grad_bias)
            block_rows(self.dq, block.q).add_(grads.q)
            block_rows(dk, block.k).add_(grads.k)
            block_rows(dv, block.k).add_(grads.v)
        return dk, dv


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], scores: Scores
) -> tuple[Tensor, Tensor]:
    """(out [B, N, S, V] in q's dtype, lse [B, N, S] in the accumulation dtype); 0 and -inf for rows without a key."""
    blocks = plan(q_runs, k_runs, scores)
    if len(blocks) == 1 and blocks[0].q.length == q.shape[2] and scores.sinks is None:
        block, k, v = blocks[0], block_rows(k, blocks[0].k), block_rows(v, blocks[0].k)
        return provider_for(q, k, v, block).block_forward(q, k, v, block, q.dtype)
    state = ForwardState.empty(q, v, scores.sinks)
    state.add(q, k, v, blocks)
    return state.out.to(q.dtype), state.lse


def backward(
    rows: Rows,
    k: Tensor,
    v: Tensor,
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
    scores: Scores,
    wants_grad_bias: bool,
) -> tuple[Gradients, Tensor | None]:
    """The gradients of q, k, v in their dtype and of the bias in the accumulation dtype (None if not wanted)."""
    blocks = plan(q_runs, k_runs, scores)
    whole = len(blocks) == 1 and blocks[0].q.length == rows.q.shape[2] and blocks[0].k.length == k.shape[2]
    if whole:
        grad_bias = BackwardState.empty_grad_bias(rows.q, scores.bias, wants_grad_bias)
        provider = provider_for(rows.q, k, v, blocks[0])
        return provider.block_backward(rows, k, v, blocks[0], rows.q.dtype, grad_bias), grad_bias
    state = BackwardState.empty(rows.q, scores.bias, wants_grad_bias)
    dk, dv = state.add(rows, k, v, blocks)
    return Gradients(state.dq.to(k.dtype), dk.to(k.dtype), dv.to(v.dtype)), state.grad_bias


def reordered(scores: Scores, order: Tensor | None) -> Scores:
    """The scores of query rows that were sorted by `order`."""
    if order is None or scores.bias is None or scores.bias.shape[2] == 1:
        return scores
    return replace(scores, bias=scores.bias.index_select(2, order))


def sink_gradient(rows: Rows, q_runs: Sequence[Run], sinks: Tensor) -> Tensor:
    """The gradient [N] of the sinks from these rows, padding left out, in the accumulation dtype.

    A sink's weight is exp(sink - lse) and its value 0, so the gradient of its score is -weight * delta.
    """
    total = torch.zeros(sinks.shape, dtype=rows.lse.dtype, device=sinks.device)
    for run in q_runs:
        weights = (sinks.to(total.dtype)[:, None] - block_rows(rows.lse, run)).exp()
        total -= (weights * block_rows(rows.delta, run)).sum((0, 2))
    return total
