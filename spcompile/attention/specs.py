"""Teaches the simulator the ops that communicate and are no plain collectives: ring attention and positions."""

from __future__ import annotations

from typing import Any

import torch

from spcompile.attention.op import spec_ring_attention, spec_ring_attention_backward
from spcompile.collectives import spec_positions
from spcompile.collectives.base import call_arguments
from spcompile.simulate import register_spec

_BIAS = 6  # argument of spx::ring_attention


def _positions(calls: list[tuple[Any, ...]]) -> list[Any]:
    op = torch.ops.spx.positions.default
    return spec_positions([{"length": call[0], **call_arguments(op, call)[1]} for call in calls])


def _ring_gradients(calls: list[Any], results: list[Any], gradients: list[Any]) -> list[Any]:
    bias = calls[0][_BIAS]
    wanted = bias is not None and bias.is_floating_point()
    rows = zip(gradients, results, calls, strict=True)
    found = spec_ring_attention_backward([(*grads, *result, *call, wanted) for grads, result, call in rows])
    return [(dq, dk, dv, None, None, None, dbias if wanted else None) for dq, dk, dv, dbias in found]


register_spec(torch.ops.spx.positions.default, _positions)
register_spec(torch.ops.spx.ring_attention.default, spec_ring_attention, _ring_gradients)
register_spec(torch.ops.spx.ring_attention_backward.default, spec_ring_attention_backward)
