"""The ops with a loop inside, and `spx::positions`, for the simulator. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spcompile.attention.op import spec_ring_attention, spec_ring_attention_backward
from spcompile.attention.ring.hops import spec_agree_on_hops
from spcompile.attention.ring.ring_call import RingBackwardCall, RingCall
from spcompile.check.simulate import register_spec
from spcompile.collectives.pipelined_matmuls import (
    all_gather_matmul,
    matmul_reduce_scatter,
    spec_all_gather_matmul,
    spec_matmul_reduce_scatter,
)
from spcompile.collectives.typed_calls import PositionsCall
from spcompile.machine import sequence


def spec_positions(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """All ranks' results of spx::positions."""
    call = PositionsCall.bind(*calls[0])
    layout = call.degree, call.order, call.device, call.inner
    return [sequence.positions(call.length, rank, *layout) for rank in range(len(calls))]


def ring_gradients(
    calls: Sequence[tuple[Any, ...]], results: Sequence[tuple[Tensor, ...]], grads: Sequence[tuple[Tensor, ...]]
) -> list[Sequence[Tensor | None]]:
    """Per rank the gradients of all arguments: q, k, v, the bias and the sinks have one."""
    backwards = []
    for args, (out, lse), (grad_out, grad_lse) in zip(calls, results, grads, strict=True):
        call = RingCall.bind(*args)
        wanted = {
            "bias_gradient": isinstance(call.bias, Tensor) and call.bias.is_floating_point(),
            "sinks_gradient": isinstance(call.sinks, Tensor),
        }
        given = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse}
        backwards.append(call.into(RingBackwardCall, **given, **wanted))
    found = spec_ring_attention_backward([tuple(call.named().values()) for call in backwards])
    return [call.gradients(RingCall, *each) for call, each in zip(backwards, found, strict=True)]


register_spec(torch.ops.spx.positions.default, spec_positions)
register_spec(torch.ops.spx.agree_on_hops.default, spec_agree_on_hops)
register_spec(torch.ops.spx.ring_attention.default, spec_ring_attention, ring_gradients)
register_spec(torch.ops.spx.ring_attention_backward.default, spec_ring_attention_backward)
register_spec(all_gather_matmul, spec_all_gather_matmul)
register_spec(matmul_reduce_scatter, spec_matmul_reduce_scatter)
