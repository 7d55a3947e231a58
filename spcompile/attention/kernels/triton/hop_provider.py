"""The Triton kernels as a provider: one launch a hop forward, state in float32, any mask under any order.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from spcompile.attention.kernels.triton.configs import Configs, device_configs, smallest, variant_of
from spcompile.attention.kernels.triton.launch import (
    ForwardTensors,
    Hop,
    RowTensors,
    dense,
    describable,
    readable,
    row_numbers_launch,
)
from spcompile.attention.kernels.triton.shared_tables import SharedTables, TableLayout
from spcompile.attention.scores.provider import Gradients, Rows, Scores
from spcompile.attention.scores.runs import Run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD = 256
MIN_SHARED = 163 * 1024  # bytes for one program: those of sm_80


Choose = Callable[[Tensor, Tensor, Tensor, Scores], Configs]


def default_configs(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Configs:
    """The row of the table for these tensors, the same for all hops."""
    return device_configs(q.device, q.element_size(), q.shape[3], v.shape[3], variant_of(scores))


def _has_kernels(device: torch.device) -> bool:
    """From sm_80 on, with the shared memory that the table counts on: not sm_86, sm_89 and sm_120."""
    found: Any = torch.cuda.get_device_properties(device)  # torch 2.13's stub lacks shared_memory_per_block_optin
    return torch.version.hip is None and found.major >= 8 and found.shared_memory_per_block_optin >= MIN_SHARED


def _shared(q: Tensor, k: Tensor, v: Tensor, scores: Scores, configs: Configs, part: int) -> SharedTables | None:
    """The tables that were made for all hops, if they were."""
    if scores.tables is None:
        return None
    data = [x for x in (scores.q_documents, scores.k_documents, scores.key_valid) if x is not None]
    batch = max((x.shape[0] for x in data), default=1)
    least = smallest(q.element_size(), q.shape[3], v.shape[3], variant_of(scores))
    layout = TableLayout(batch, q.shape[2], k.shape[2], scores.mask.documents, least)
    return SharedTables(scores.tables, layout, configs, part)


@dataclass(frozen=True)
class Triton:
    """The provider. choose_configs: for tests, which want small tiles."""

    name: ClassVar[str] = "triton"
    choose_configs: Choose = default_configs

    def supports_hops(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> bool:
        """Halves and float32 on an NVIDIA GPU of a data centre, head sizes up to 256, a positive scale."""
        if not (_has_kernels(q.device) if q.device.type == "cuda" else triton.knobs.runtime.interpret):
            return False
        added = [x for x in (scores.bias, scores.alibi_slopes, scores.sinks) if x is not None]
        wide = any(x.dtype == torch.float64 for x in added)
        same = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
        return same and not wide and scores.scale > 0 and max(q.shape[3], v.shape[3]) <= MAX_HEAD

    def start_forward(self, q: Tensor, v: Tensor, scores: Scores) -> Forward:
        """See `HopProvider`."""
        return Forward(q, v.shape[3], scores, self.choose_configs)

    def start_backward(self, rows: Rows, v: Tensor, scores: Scores, wants_grad_bias: bool) -> Backward:
        """See `HopProvider`."""
        return Backward(rows, scores, wants_grad_bias, self.choose_configs, torch.float32)

    def backward(
        self,
        rows: Rows,
        k: Tensor,
        v: Tensor,
        q_runs: Sequence[Run],
        k_runs: Sequence[Run],
        scores: Scores,
        wants_grad_bias: bool,
        part: int = 0,
    ) -> tuple[Gradients, Tensor | None]:
        """See `HopProvider`."""
        state = Backward(rows, scores, wants_grad_bias, self.choose_configs, rows.q.dtype)
        dk, dv = state.add(k, v, q_runs, k_runs, last=True, part=part)
        dq, grad_bias = state.result()
        return Gradients(dq, dk, dv), grad_bias


class Forward:
    """`ForwardHops`: one launch a hop. The state is made when a hop comes that is not the last."""

    def __init__(self, q: Tensor, v_size: int, scores: Scores, choose: Choose) -> None:
        self._q, self._scores, self._choose = q, scores, choose
        B, N, S, _ = q.shape
        out = q.new_empty((B, S, N, v_size)).transpose(1, 2)  # in memory as spx.attention returns it
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        self._tensors = ForwardTensors(out, lse, out, lse, lse)
        self._first = True

    def add(
        self, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], last: bool, part: int = 0
    ) -> None:
        """See `ForwardHops`."""
        if self._first and not last:
            out, lse = self._tensors.out, self._tensors.lse
            acc = torch.empty_like(out, dtype=torch.float32)
            self._tensors = ForwardTensors(out, lse, acc, torch.empty_like(lse), torch.empty_like(lse))
        configs = self._choose(self._q, k, v, self._scores)
        self._q, k, v = (readable(x, configs) for x in (self._q, k, v))
        shared = _shared(self._q, k, v, self._scores, configs, part)
        hop = Hop(self._q, k, v, q_runs, k_runs, self._scores, configs, shared)
        hop.forward(self._tensors, self._first, last).run()
        self._first = False

    def result(self) -> tuple[Tensor, Tensor]:
        """See `ForwardHops`."""
        return self._tensors.out, self._tensors.lse


class Backward:
    """`BackwardHops`: two launches a hop, three where a bias wants its gradient. dtype: of dk and dv."""

    def __init__(self, rows: Rows, scores: Scores, wants_grad_bias: bool, choose: Choose, dtype: torch.dtype) -> None:
        self._q, self._scores, self._choose, self._dtype = rows.q, scores, choose, dtype
        lse = rows.lse.contiguous()
        grad_lse = None if rows.grad_lse is None else rows.grad_lse.contiguous()
        # A gradient such as that of sum() is expanded, and no descriptor describes it.
        grad_out = rows.grad_out if describable(rows.grad_out) else rows.grad_out.contiguous()
        self._rows = RowTensors(grad_out, torch.empty_like(lse), torch.empty_like(lse))
        row_numbers_launch(dense(rows.out), lse, grad_lse, self._rows).run()
        self._dq = torch.empty(rows.q.shape, dtype=rows.q.dtype, device=rows.q.device)
        self._dq_state = self._dq
        bias = scores.bias
        self._grad_bias = None
        if bias is not None and wants_grad_bias and bias.is_floating_point():
            self._grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        self._first = True

    def add(
        self, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], last: bool, part: int = 0
    ) -> tuple[Tensor, Tensor]:
        """See `BackwardHops`."""
        if self._first and not last:
            self._dq_state = torch.empty_like(self._dq, dtype=torch.float32)
        configs = self._choose(self._q, k, v, self._scores)
        self._q, k, v = (readable(x, configs) for x in (self._q, k, v))
        shared = _shared(self._q, k, v, self._scores, configs, part)
        hop = Hop(self._q, k, v, q_runs, k_runs, self._scores, configs, shared)
        dk, dv = (torch.empty(x.shape, dtype=self._dtype, device=x.device) for x in (k, v))
        hop.row_gradients(self._rows, self._dq_state, self._dq, self._first, last).run()
        hop.key_gradients(self._rows, dk, dv).run()
        if self._grad_bias is not None:
            hop.bias_gradient(self._rows, self._grad_bias).run()
        self._first = False
        return dk, dv

    def result(self) -> tuple[Tensor, Tensor | None]:
        """See `BackwardHops`."""
        return self._dq, self._grad_bias
