"""What attention holds while it runs, measured beside the formulas: by PyTorch's kernels, and by Triton's.

B batch, N query heads, G key heads, S local rows, H head width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from one_rank import as_rank

import spcompile.attention.op  # noqa: F401  (defines the ops)
from spcompile.attention.attention_scratch import attention_scratch
from spcompile.attention.kernels import hop_state
from spcompile.attention.ring.ring_call import RingBackwardCall, RingCall
from spcompile.attention.scores.attention_call import Attention, AttentionBackwardCall, AttentionCall
from spcompile.graph.sizes import hint
from spcompile.memory.allocated import peak_on_cpu

B, N, G, S, H = 1, 4, 2, 1024, 64
PACKED = 2 * G * S * H * 2  # keys and values, which kernels for half precision may put in another order of memory
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


pytestmark = pytest.mark.usefixtures("one_thread")


def operands(dtype: torch.dtype) -> dict[str, Any]:
    """As a model leaves them: heads behind rows in memory."""
    sizes = {"q": N, "k": G, "v": G}
    return {name: torch.randn(B, S, n, H, dtype=dtype).transpose(1, 2) for name, n in sizes.items()}


def of_results(dtype: torch.dtype) -> dict[str, Any]:
    """What a backward takes besides."""
    out, grad_out = (torch.randn(B, S, N, H, dtype=dtype).transpose(1, 2) for _ in range(2))
    lse = torch.zeros(B, N, S)
    return {"out": out, "grad_out": grad_out, "grad_lse": None, "lse": lse, "bias_gradient": False}


def planned(call: Attention, fused: bool) -> int:
    """The formula of a call of tensors."""
    graph, nodes = fx.Graph(), {}
    for name, value in call.named().items():
        if isinstance(value, torch.Tensor):
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = value
    args, kwargs = call.but(**nodes).arguments()
    return int(attention_scratch(graph.call_function(call.target(), args, kwargs), fused, hint))


def measured(call: Attention, degree: int) -> tuple[int, int]:
    """(beside the results at the peak, of the results): of the last rank, on a group that moves nothing."""
    with as_rank(degree - 1, {"cp": degree}, "cpu") as mesh:
        here = call.but(axis=mesh.group_name("cp")) if isinstance(call, RingCall) else call
        results = sum(x.nbytes for x in here.run())
        return peak_on_cpu(here.run) - results, results


def require_near(call: Attention, beside: int, results: int) -> None:
    """To a few parts in a hundred of the results. Tiles of a window reach fewer keys than the formula says."""
    off = beside - planned(call, fused=False)
    assert off <= 0.05 * results + (2 * PACKED if call.q.dtype == torch.bfloat16 else 0)
    assert off >= -0.03 * results - (planned(call, fused=False) / 2 if "window" in call.mask else 0)


def ring(degree: int, order: str) -> dict[str, Any]:
    return {"q_length": degree * S, "k_length": degree * S, "axis": "cp", "degree": degree, "order": order}


@DTYPES
@pytest.mark.parametrize("mask", ["causal", "full", "causal window=100"])
@pytest.mark.thinned(6)
def test_attention_by_torchs_kernels(mask: str, dtype: torch.dtype) -> None:
    forward = AttentionCall(**operands(dtype), mask=mask, scale=0.1)
    for call in (forward, forward.into(AttentionBackwardCall, **of_results(dtype))):
        beside, results = measured(call, 2)
        require_near(call, beside, results)


@DTYPES
@pytest.mark.parametrize(("degree", "order"), [(2, "zigzag"), (3, "zigzag"), (4, "contiguous")])
@pytest.mark.thinned(6)
def test_rings_by_torchs_kernels(degree: int, order: str, dtype: torch.dtype) -> None:
    forward = RingCall(**operands(dtype), mask="causal", scale=0.1, **ring(degree, order))
    for call in (forward, forward.into(RingBackwardCall, **of_results(dtype))):
        beside, results = measured(call, degree)
        require_near(call, beside, results)


@DTYPES
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.thinned(6)
def test_tritons_kernels(degree: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not run: what is allocated for them is what counts."""
    pytest.importorskip("triton")
    from spcompile.attention.kernels.triton.hop_provider import Triton
    from spcompile.attention.kernels.triton.launch import Launch

    provider = Triton()
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    monkeypatch.setattr(hop_state, "_whole_hops", lambda *_: provider)
    forward: Attention = AttentionCall(**operands(dtype), mask="causal", scale=0.1)
    kinds: tuple[Any, Any] = (AttentionCall, AttentionBackwardCall)
    if degree > 1:
        forward, kinds = forward.into(RingCall, **ring(degree, "zigzag")), (RingCall, RingBackwardCall)
    for call in (forward, forward.into(kinds[1], **of_results(dtype))):
        beside, results = measured(call, max(2, degree))
        assert abs(beside - planned(call, fused=True)) <= 0.03 * results
