"""PyTorch's own kernels for plain attention on GPUs: flash and cuDNN, with the log-sum-exp that our op returns.

Read from torch 2.13: both take fewer key heads than query heads; flash returns lse [B, N, S] and cuDNN [B, N, S, 1],
natural logarithms in float32 as ours; without dropout neither looks at the random state that its backward is given.
Their backward knows no gradient of lse: then ours takes over, since it reads the same out and lse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spcompile.attention.kernels.choice import Wanted, kernels_for
from spcompile.attention.scores.provider import Gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from spcompile.attention.scores.provider import Rows, Scores
    from spcompile.attention.scores.runs import Run

aten = torch.ops.aten


def wanted_of(
    q: Tensor, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], scores: Scores, capability: int
) -> Wanted:
    """What `choice.TABLE` asks of an attention that has all its keys."""
    more = (scores.bias, scores.alibi_slopes, scores.sinks, scores.dropout)
    return Wanted(
        capability=capability,
        dtype=q.dtype if q.dtype == k.dtype == v.dtype else torch.float64,
        head_size=q.shape[3],
        v_size=v.shape[3],
        mask=scores.mask,
        is_plain=scores.softcap == 0 and all(x is None for x in more),
        in_hops=not (_is_natural(q_runs, q.shape[2]) and _is_natural(k_runs, k.shape[2])),
        square=q.shape[2] == k.shape[2],
        scale=scores.scale,
    )


def _is_natural(runs: Sequence[Run], length: int) -> bool:
    """Whether rows stand in their order, none of them padding, the first one at the start of the sequence."""
    if len(runs) != 1 or runs[0].gaps is not None:
        return False
    return (runs[0].start, runs[0].length, runs[0].first) == (0, length, 0)


def torch_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_runs: Sequence[Run], k_runs: Sequence[Run], scores: Scores
) -> str | None:
    """ "cudnn" or "flash", if that is the best kernel for these tensors and torch would use it; else None."""
    if q.device.type != "cuda" or not all(x.numel() for x in (q, k, v)):
        return None
    major, minor = torch.cuda.get_device_capability(q.device)
    for row in kernels_for(wanted_of(q, k, v, q_runs, k_runs, scores, 10 * major + minor)):
        if row.name not in _CAN_USE:
            return None
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, scores.mask.causal, q.shape[1] != k.shape[1])
        if torch.version.hip is None and _CAN_USE[row.name](params):
            return row.name
    return None


_CAN_USE: dict[str, Any] = {
    "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    "flash": torch.backends.cuda.can_use_flash_attention,
}


def forward(kernel: str, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out in q's dtype, lse float32 [B, N, S])."""
    q, k, v = (_dense(x) for x in (q, k, v))
    causal, scale = scores.mask.causal, scores.scale
    if kernel == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return out, lse.view(q.shape[:3])
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def backward(kernel: str, rows: Rows, k: Tensor, v: Tensor, scores: Scores) -> Gradients:
    """The gradients of q, k and v in their dtype; without a gradient of lse."""
    q, k, v, out, grad_out = (_dense(x) for x in (rows.q, k, v, rows.out, rows.grad_out))
    lengths = q.shape[2], k.shape[2]
    tail: tuple[Any, ...] = (0.0, scores.mask.causal)
    if kernel == "cudnn":
        seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device)
        lse = rows.lse.unsqueeze(3)
        return Gradients(
            *aten._scaled_dot_product_cudnn_attention_backward(
                grad_out, q, k, v, out, lse, seed, offset, None, None, None, *lengths, *tail, scale=scores.scale
            )
        )
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    return Gradients(
        *aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, rows.lse, None, None, *lengths, *tail, seed, unused, scale=scores.scale
        )
    )


def _dense(x: Tensor) -> Tensor:
    """`x` with a dense last dim and no dim that is expanded."""
    is_dense = x.stride(3) == 1 and all(x.stride(dim) for dim in range(3))
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)
