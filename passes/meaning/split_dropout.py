"""split-dropout: the random mask becomes a value of its own.

Before: y = dropout(x, p). After: keep = dropout(ones) != 0, y = x * (keep * 1/(1-p)). The mask depends on no data, so
it is drawn for the whole tensor on every rank, from the same random state, and each rank keeps its part: the numbers
are those one device draws, and x itself is never gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import argument
from spcompile.graph.splice import splice
from spcompile.passes_api import Context, Example, Pass, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitDropout(Pass):
    """Draw dropout masks apart from the data they are applied to."""

    name: ClassVar[str] = "split-dropout"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-attention"})
    summary: ClassVar[str] = "draws dropout masks apart from their data, so that the data stays sharded"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every dropout that is active; one whose input is constant is a mask already."""
        matches = [n for n in gm.graph.nodes if n.target is aten.dropout.default and _is_active(n)]
        for node in matches:
            x, p = argument(node, 0, "input"), argument(node, 1, "p")
            result = splice(masked, (x, p), like=node)
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
            ctx.remarks.add(
                "SPR302",
                "a dropout mask is drawn for the whole tensor on every rank, to equal one device's",
                result,
                strict_error=False,
            )
        return len(matches)


def _is_active(node: fx.Node) -> bool:
    x = argument(node, 0, "input")
    drawn_apart = isinstance(x, fx.Node) and x.target is aten.ones.default
    return bool(argument(node, 2, "train")) and 0 < argument(node, 1, "p") < 1 and not drawn_apart


def masked(x: Tensor, p: float) -> Tensor:
    """dropout(x, p) in training, bit for bit: native_dropout scales the mask before it multiplies.

    It draws in the order in which `x` lies in memory, so the mask is drawn in that order of dims.
    """
    order = _memory_order(x)
    ones = aten.ones.default([x.shape[d] for d in order], dtype=x.dtype, device=x.device)
    keep = aten.ne.Scalar(aten.dropout.default(ones, p, True), 0)
    if order != sorted(order):
        keep = keep.permute([order.index(d) for d in range(x.ndim)])
    return x * (keep.to(x.dtype) * (1 / (1 - p)))


def _memory_order(x: Tensor) -> list[int]:
    """The dims of `x` from the largest stride to the smallest; as they are where strides are symbols."""
    strides = x.stride()
    known = all(isinstance(stride, int) for stride in strides)
    return sorted(range(x.ndim), key=lambda d: -strides[d]) if known else list(range(x.ndim))


def _dropped(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, 0.25, training=True)


EXAMPLE = Example(_dropped, lambda: (torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True),))
