"""choose-attention: ring or Ulysses for every attention, and the order of the sequence that suits them.

Ulysses exchanges heads for sequence: (P-1)/P^2 * s*b*d*(2a + 2max(g, P)) elements a pass, and in the backward again
what it does not save, the result and repeated keys and values. A ring moves keys and values: 2(P-1)/P * s*b*g*d
forward, and twice that plus fp32 gradients backward (Liu et al. 2023; counted as in spcompile.attention.ring). "auto"
takes the fewer bytes forward and backward, where the head counts allow both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.mask import AttentionMask
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sizes import hint
from spcompile.tensor_parallel import heads_on_a_rank

spx = torch.ops.spx


@dataclass(frozen=True)
class ChooseAttention(Pass):
    """Record a strategy on every attention, and the order of the sequence in the context."""

    name: ClassVar[str] = "choose-attention"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-mask"})
    axis: ClassVar[str | None] = "cp"
    summary: ClassVar[str] = "chooses ring or Ulysses by head counts and bytes, and the order of the sequence"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Decide; rewrites nothing."""
        degree = ctx.mesh.size("cp")
        attentions = [n for n in gm.graph.nodes if n.target is spx.attention.default]
        order = "contiguous"
        for node in attentions:
            strategy, why = choose(node, degree, ctx.options.attention, ctx.mesh.size("tp"))
            asked = ctx.options.attention
            node.meta["custom"] = {**node.meta.get("custom", {}), "spx_attention": strategy}
            if asked in (strategy, "auto"):
                ctx.remarks.add("SPR203", f"attention runs as {strategy}: {why}", strict_error=False)
            else:
                ctx.remarks.add("SPR204", f"attention={asked!r} was asked for, {strategy} is used: {why}", node)
            causal = AttentionMask.parse(str(node.args[9])).causal
            if strategy == "ring" and causal and ctx.options.balance == "zigzag" and ctx.options.outputs != "sharded":
                order = "zigzag"
        ctx.order = order
        return 0


def choose(node: fx.Node, degree: int, asked: str, tensor_degree: int = 1) -> tuple[str, str]:
    """(strategy, reason) for one attention: "ring" or "ulysses". Only the heads that tp leaves on a rank count."""
    q_BNSH, k_BGTH, v_BGTV = (node.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
    heads, kv_heads = heads_on_a_rank(hint(q_BNSH.shape[1]), hint(k_BGTH.shape[1]), tensor_degree)
    bias = node.args[8]
    has_rows = isinstance(bias, fx.Node) and hint(bias.meta["val"].shape[2]) != 1
    misfit = _ulysses_misfit(heads, kv_heads, degree, has_rows)
    if misfit is not None:
        return "ring", misfit
    if asked != "auto":
        return asked, "asked for"
    width = (hint(q_BNSH.shape[3]), hint(v_BGTV.shape[3]))
    ulysses, ring = _elements(heads, kv_heads, width, degree, q_BNSH.element_size())
    strategy = "ulysses" if ulysses <= ring else "ring"
    return strategy, f"{heads} heads, {kv_heads} key/value heads, {ulysses:.4g} against {ring:.4g} bytes a token"


def _ulysses_misfit(heads: int, kv_heads: int, degree: int, bias_has_rows: bool) -> str | None:
    if heads % degree:
        return f"{heads} heads do not divide by cp = {degree}"
    if kv_heads % degree and degree % kv_heads:
        return f"{kv_heads} key/value heads and cp = {degree} do not divide each other"
    if bias_has_rows:
        return "its dense mask is split by query rows"
    return None


def _elements(heads: int, kv_heads: int, width: tuple[int, int], degree: int, itemsize: int) -> tuple[float, float]:
    """Bytes sent per rank and token of the whole sequence, forward and backward: (Ulysses, ring)."""
    qk, v = width
    sent = max(kv_heads, degree)
    again = heads * v + (sent * (qk + v) if kv_heads < degree else 0)
    ulysses = (degree - 1) / degree**2 * (2 * (heads + sent) * (qk + v) + again) * itemsize
    wide = max(itemsize, 4)
    ring = (qk + v) * kv_heads / degree * ((degree - 1) * 2 * itemsize + degree * wide)
    return ulysses, ring


def _grouped_attention(q_BNSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, heads, 7, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))


EXAMPLE = Example(_grouped_attention, _inputs)
