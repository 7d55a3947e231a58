"""The ops with a loop inside, and `spx::positions`, for the simulator. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spcompile.attention.op import DEFAULTS, spec_ring_attention, spec_ring_attention_backward
from spcompile.attention.ring.hops import spec_agree_on_hops
from spcompile.check.simulate import register_spec
from spcompile.collectives.pipelined_products import (
    all_gather_matmul,
    matmul_reduce_scatter,
    spec_all_gather_matmul,
    spec_matmul_reduce_scatter,
)
from spcompile.machine import sequence

# Places of the bias, the optional arguments, the sinks and the layout's last part in spx::ring_attention, and how many
# arguments it has.
_BIAS, _MORE, _SINKS, _INNER, _ARGUMENTS = 6, 14, 15, 19, 21


def positions(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """All ranks' results of spx::positions(length, axis, degree, order, device)."""
    length, _, degree, order, device = calls[0]
    return [sequence.positions(length, rank, degree, order, device) for rank in range(len(calls))]


def ring_gradients(
    calls: Sequence[tuple[Any, ...]], results: Sequence[tuple[Tensor, ...]], grads: Sequence[tuple[Tensor, ...]]
) -> list[Sequence[Tensor | None]]:
    """Per rank the gradients of all arguments: q, k, v, the bias and the sinks have one."""
    ranks = []
    for call, (out, lse), (grad_out, grad_lse) in zip(calls, results, grads, strict=True):
        data, more = call[:_MORE], (*call[_MORE:_INNER], *DEFAULTS[len(call) - _MORE :])
        wants_bias = isinstance(call[_BIAS], Tensor) and call[_BIAS].is_floating_point()
        wants_sinks = isinstance(more[_SINKS - _MORE], Tensor)
        ranks.append((grad_out, grad_lse, out, lse, *data, wants_bias, *more, wants_sinks, *call[_INNER:]))
    all_grads: list[Sequence[Tensor | None]] = []
    for arguments, (dq, dk, dv, dbias, dsinks) in zip(ranks, spec_ring_attention_backward(ranks), strict=True):
        wants_bias, wants_sinks = arguments[4 + _MORE], arguments[5 + _INNER]
        found: list[Tensor | None] = [None] * _ARGUMENTS
        found[:3] = dq, dk, dv
        found[_BIAS], found[_SINKS] = dbias if wants_bias else None, dsinks if wants_sinks else None
        all_grads.append(found)
    return all_grads


register_spec(torch.ops.spx.positions.default, positions)
register_spec(torch.ops.spx.agree_on_hops.default, spec_agree_on_hops)
register_spec(torch.ops.spx.ring_attention.default, spec_ring_attention, ring_gradients)
register_spec(torch.ops.spx.ring_attention_backward.default, spec_ring_attention_backward)
register_spec(all_gather_matmul, spec_all_gather_matmul)
register_spec(matmul_reduce_scatter, spec_matmul_reduce_scatter)
