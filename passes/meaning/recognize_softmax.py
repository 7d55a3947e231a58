"""recognize-softmax: softmax written out becomes one node.

    e / sum(e)  where e = exp(x)       softmax(x)
    x - log(sum(exp(x)))               log_softmax(x)
    x - logsumexp(x)                   log_softmax(x)

Subtracting the row's maximum, as one writes it so that exp does not overflow, changes neither value nor gradient. It is
left behind for recognize-attention, which finds attention around a softmax, and taken out of a log_softmax, which the
loss over a sharded vocabulary reads. Where exp overflows, the written-out form is inf or NaN, the node is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import argument, call, erase_dead, replace
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.eager import without_maximum
from spcompile.recognition.normalizers import SUM, exponent, normalizer, reduction

aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeSoftmax(Pass):
    """Every softmax and log_softmax that is written out becomes a node."""

    name: ClassVar[str] = "recognize-softmax"
    stage: ClassVar[Stage] = Stage.GLOBAL
    summary: ClassVar[str] = "softmax and log_softmax written with exp and sum become one node"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every quotient and difference that is one."""
        rewrites = 0
        for node in list(gm.graph.nodes):
            if node.target is aten.div.Tensor:
                found = _softmax(node)
            elif node.target is aten.sub.Tensor:
                found = _log_softmax(node)
            else:
                continue
            if found is not None:
                x, dim, target = found
                replace(node, call(gm.graph, target, (x, dim), like=node))
                rewrites += 1
        if rewrites:
            erase_dead(gm)
        return rewrites


def _softmax(quotient: fx.Node) -> tuple[fx.Node, int, Any] | None:
    exponentials, total = quotient.args[:2]
    found, x = reduction(total), exponent(exponentials)
    if found is None or x is None or found.is_log or found.op is not SUM or found.operand is not exponentials:
        return None
    return (x, found.dim, aten.softmax.int) if found.is_kept else None


def _log_softmax(difference: fx.Node) -> tuple[fx.Node, int, Any] | None:
    x, total = difference.args[:2]
    found = normalizer(total)
    if found is None or found.of is not x or not found.is_kept or argument(difference, 2, "alpha", 1) != 1:
        return None
    return without_maximum(x, found.dim), found.dim, aten.log_softmax.int


def _by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    exponentials = (x - x.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True), x - x.logsumexp(0).unsqueeze(0)


def _inputs() -> tuple[Tensor]:
    return (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),)


EXAMPLE = Example(_by_hand, _inputs)
