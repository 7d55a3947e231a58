"""The attention ops and `spx::positions` for the simulator. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spcompile import sequence
from spcompile.attention.op import spec_ring_attention, spec_ring_attention_backward
from spcompile.simulate import register_spec

_BIAS = 6  # place of the bias among the arguments of spx::ring_attention


def positions(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """All ranks' results of spx::positions(length, axis, degree, order, device)."""
    length, _, degree, order, device = calls[0]
    return [sequence.positions(length, rank, degree, order, device) for rank in range(len(calls))]


def ring_gradients(
    calls: Sequence[tuple[Any, ...]], results: Sequence[tuple[Tensor, ...]], grads: Sequence[tuple[Tensor, ...]]
) -> list[Sequence[Tensor | None]]:
    """Per rank the gradients of q, k, v and the bias; three arguments without gradients stand between them."""
    wants_bias = [isinstance(call[_BIAS], Tensor) and call[_BIAS].is_floating_point() for call in calls]
    ranks = [
        (grad_out, grad_lse, out, lse, *call, wanted)
        for call, (out, lse), (grad_out, grad_lse), wanted in zip(calls, results, grads, wants_bias, strict=True)
    ]
    found = spec_ring_attention_backward(ranks)
    return [
        (dq, dk, dv, None, None, None, dbias if wanted else None)
        for (dq, dk, dv, dbias), wanted in zip(found, wants_bias, strict=True)
    ]


register_spec(torch.ops.spx.positions.default, positions)
register_spec(torch.ops.spx.ring_attention.default, spec_ring_attention, ring_gradients)
register_spec(torch.ops.spx.ring_attention_backward.default, spec_ring_attention_backward)
