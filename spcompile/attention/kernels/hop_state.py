"""Rows that see the keys of one hop after another: what they carry between hops, and which kernel takes a hop.

A hop is some keys with the runs they are in; one device alone has one hop. What PyTorch's own kernels on GPUs compute
as well goes to them (`choice.TABLE`). The Triton kernels take a hop whole, in one launch; the block providers take it
block by block, and their results are merged. Either way nothing is rounded before the last hop.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

from spcompile.attention.kernels import blocks, whole_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from spcompile.attention.scores.provider import BackwardHops, ForwardHops, Gradients, HopProvider, Rows, Scores
    from spcompile.attention.scores.runs import Run


@functools.cache
def _triton() -> HopProvider | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from spcompile.attention.kernels.triton.hop_provider import Triton

    return Triton()


def _whole_hops(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> HopProvider | None:
    """The provider that takes such hops whole. CPU tensors never do, so triton is not imported for them."""
    provider = _triton() if q.device.type == "cuda" else None
    return provider if provider is not None and provider.supports_hops(q, k, v, scores) else None


def reads_tables(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> bool:
    """Whether what computes this attention asks `Scores.tables` where rows and keys are."""
    return scores.tables is not None and _whole_hops(q, k, v, scores) is not None


def start_forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> ForwardHops:
    """Rows q [B, N, S, H] before the first key; k and v are those of any hop."""
    provider = _whole_hops(q, k, v, scores)
    return MergedForward(q, v, scores) if provider is None else provider.start_forward(q, v, scores)


def start_backward(rows: Rows, k: Tensor, v: Tensor, scores: Scores, wants_grad_bias: bool) -> BackwardHops:
    """The gradients of rows before the first key; k and v are those of any hop."""
    provider = _whole_hops(rows.q, k, v, scores)
    if provider is None:
        return MergedBackward(rows, scores, wants_grad_bias)
    return provider.start_backward(rows, v, scores, wants_grad_bias)


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], scores: Scores, part: int = 0
) -> tuple[Tensor, Tensor]:
    """`blocks.forward`, by the best provider. part: as in `ForwardHops`."""
    if (kernel := whole_rows.torch_kernel(q, k, v, q_runs, k_runs, scores)) is not None:
        return whole_rows.forward(kernel, q, k, v, scores)
    if _whole_hops(q, k, v, scores) is None:
        return blocks.forward(q, k, v, q_runs, k_runs, scores)
    state = start_forward(q, k, v, scores)
    state.add(k, v, q_runs, k_runs, last=True, part=part)
    return state.result()


def backward(
    rows: Rows,
    k: Tensor,
    v: Tensor,
    q_runs: Sequence[Run],
    k_runs: Sequence[Run],
    scores: Scores,
    wants_grad_bias: bool,
    part: int = 0,
) -> tuple[Gradients, Tensor | None]:
    """`blocks.backward`, by the best provider. part: as in `ForwardHops`."""
    if rows.grad_lse is None:
        kernel = whole_rows.torch_kernel(rows.q, k, v, q_runs, k_runs, scores)
        if kernel is not None:
            return whole_rows.backward(kernel, rows, k, v, scores), None
    provider = _whole_hops(rows.q, k, v, scores)
    if provider is None:
        return blocks.backward(rows, k, v, q_runs, k_runs, scores, wants_grad_bias)
    return provider.backward(rows, k, v, q_runs, k_runs, scores, wants_grad_bias, part)


class MergedForward:
    """`ForwardHops` by block providers."""

    def __init__(self, q: Tensor, v: Tensor, scores: Scores) -> None:
        self._q, self._scores = q, scores
        self._state = blocks.ForwardState.empty(q, v, scores.sinks)

    def add(
        self, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], last: bool, part: int = 0
    ) -> None:
        """See `ForwardHops`."""
        self._state.add(self._q, k, v, blocks.plan(q_runs, k_runs, self._scores))

    def result(self) -> tuple[Tensor, Tensor]:
        """See `ForwardHops`."""
        return self._state.out.to(self._q.dtype), self._state.lse


class MergedBackward:
    """`BackwardHops` by block providers."""

    def __init__(self, rows: Rows, scores: Scores, wants_grad_bias: bool) -> None:
        self._rows, self._scores = rows, scores
        self._state = blocks.BackwardState.empty(rows.q, scores.bias, wants_grad_bias)

    def add(
        self, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], last: bool, part: int = 0
    ) -> tuple[Tensor, Tensor]:
        """See `BackwardHops`."""
        return self._state.add(self._rows, k, v, blocks.plan(q_runs, k_runs, self._scores))

    def result(self) -> tuple[Tensor, Tensor | None]:
        """See `BackwardHops`."""
        return self._state.dq.to(self._rows.q.dtype), self._state.grad_bias
