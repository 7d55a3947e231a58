"""The part `kernels` of `gpu.py`: every kind of attention on the device against the CPU in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where the run is. small: sizes of a dry run."""

    device: str
    small: bool

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


Step = tuple[str, Callable[[], tuple[str, dict[str, Any]]]]  # what it is; (verdict, figures)


def verdict(is_right: bool) -> str:
    return "pass" if is_right else "fail"


def attention_results(call: Any, grad_out: Tensor, hops: int) -> list[list[Tensor]]:
    """Per rank out, dq, dk, dv and the gradients of bias and sinks, where they have any. call(rank): its arguments."""
    from spcompile.attention import op
    from spcompile.attention.ring.ring_call import RingBackwardCall
    from spcompile.attention.scores.attention_call import AttentionBackwardCall

    calls = [call(rank) for rank in range(hops)]
    grads = grad_out.chunk(hops, 2)
    more = {"bias_gradient": calls[0].bias is not None, "sinks_gradient": calls[0].sinks is not None}
    if hops == 1:
        outs = [calls[0].run()]
        kind: Any = AttentionBackwardCall
    else:
        outs, kind = op.spec_ring_attention([tuple(c.named().values()) for c in calls]), RingBackwardCall
    backwards = [
        c.into(kind, grad_out=grad.contiguous(), grad_lse=None, out=out, lse=lse, **more)
        for c, grad, (out, lse) in zip(calls, grads, outs, strict=True)
    ]
    if hops == 1:
        found = [backwards[0].run()]
    else:
        found = op.spec_ring_attention_backward([tuple(c.named().values()) for c in backwards])
    return [[out, *(g for g in gradients if g.numel())] for (out, _), gradients in zip(outs, found, strict=True)]


def kernel_case(place: Place, dtype: torch.dtype, size: int, mask: str, hops: int, **more: Any) -> tuple[str, Any]:
    """On the device in `dtype` against the CPU in float64, from the same numbers."""
    from spcompile.attention.kernels import table_op  # noqa: F401  (defines spx::tile_tables)
    from spcompile.attention.kernels.triton.configs import variant_of
    from spcompile.attention.ring.ring_call import RingCall
    from spcompile.attention.scores.attention_call import AttentionCall

    torch.manual_seed(size)
    B, N, G, S = 2, 4, 2, 64 if place.small else 512
    exact = [torch.randn(B, n, S, size).to(dtype).double() for n in (N, G, G, N)]
    ids = torch.randint(0, 4, (B, S)).sort(-1).values if "documents" in mask else None
    data = {"q_documents": ids, "k_documents": ids, "key_valid": torch.rand(B, S) > 0.2 if "padding" in mask else None}
    if more.pop("alibi", False):
        data["alibi_slopes"] = 2.0 ** -torch.arange(1, N + 1, dtype=torch.float32)
    if more.pop("sinks", False):
        data["sinks"] = torch.randn(N)
    if more.pop("bias", False):
        data["bias"] = torch.randn(1, N, S, S).to(dtype)
    if more.get("dropout_p"):
        data["dropout_seed"] = torch.randint(0, 2**40, (B, N))
    on_device = place.device == "cuda"

    def call(rank: int, device: str, kind: torch.dtype, tables: bool) -> Any:
        q, k, v = (x.chunk(hops, 2)[rank].to(device, kind).contiguous() for x in exact[:3])
        own = {name: None if x is None else x.to(device) for name, x in data.items()}
        for name in ("bias", "sinks", "alibi_slopes"):
            wide = own.get(name) is not None and kind == torch.float64
            own[name] = own[name].double() if wide else own.get(name)  # type: ignore[union-attr]
        if own["bias"] is not None:
            own["bias"] = own["bias"].chunk(hops, 2)[rank].contiguous()
        named = {"q": q, "k": k, "v": v, "mask": mask, "scale": size**-0.5, **own, **more}
        if hops == 1:
            found: Any = AttentionCall(**named)
        else:
            layout = {"q_length": S, "k_length": S, "axis": "cp", "degree": hops, "order": "contiguous"}
            found = RingCall(**named, **layout)
        if tables and found.attention_mask.needs_data:
            at = torch.arange(S, dtype=torch.int32, device=device).chunk(hops)[rank].contiguous()
            ids_of = (own["q_documents"], own["k_documents"], own["key_valid"])
            sizes = (S, S, hops, "contiguous", 1, q.element_size(), size, size, variant_of(found.scores()))
            found = found.but(tables=torch.ops.spx.tile_tables(at, None, *ids_of, mask, *sizes))
        return found

    grad_out = exact[3]
    here = attention_results(
        functools.partial(call, device=place.device, kind=dtype, tables=on_device),
        grad_out.to(place.device, dtype),
        hops,
    )
    there = attention_results(functools.partial(call, device="cpu", kind=torch.float64, tables=False), grad_out, hops)
    errors = [
        float((a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1e-9))
        for mine, expected in zip(here, there, strict=True)
        for a, b in zip(mine, expected, strict=True)
    ]
    allowed = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    return verdict(all(error <= allowed for error in errors)), {"error": max(errors), "allowed": allowed}


def kernels(place: Place) -> Iterator[Step]:
    halves = (torch.bfloat16, torch.float16)
    masks = ("full", "causal", "causal window=100", "causal documents", "documents key_padding", "causal chunk=64")
    cases: list[tuple[torch.dtype, int, str, int, dict[str, Any]]] = []
    for dtype in (*halves, torch.float32):
        for size in (64, 128) if place.small else (64, 80, 128, 256):
            cases += [(dtype, size, "causal", 1, {}), (dtype, size, "full", 4, {})]
    for mask in masks:
        cases += [(torch.bfloat16, 128, mask, hops, {}) for hops in (1, 4, 16)]
    features = ({"softcap": 20.0}, {"sinks": True}, {"alibi": True}, {"bias": True}, {"dropout_p": 0.2})
    cases += [(torch.bfloat16, 64, "causal", hops, more) for more in features for hops in (1, 4)]
    for dtype, size, mask, hops, more in cases[:: 5 if place.small else 1]:
        what = f"{str(dtype)[6:]} d{size} {mask} {' '.join(more)}".strip() + f", {hops} hops"
        yield what, functools.partial(kernel_case, place, dtype, size, mask, hops, **more)
