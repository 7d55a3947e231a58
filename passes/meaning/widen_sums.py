"""widen-sums: sums and means in half precision are taken in float32 and rounded once, at the end.

    sum(x), mean(x)                  to(sum(x, dtype=float32), bfloat16)
    cross_entropy(x, t, sum)         to(cross_entropy(to(x, float32), t, sum), bfloat16)

One kernel does so inside. Where ranks sum parts, each would round its own, and their total once more: of 1001 ones
in bfloat16 that makes 1000 or 1004, and in float16 a term of a mean may overflow where the mean does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.edit import call, erase_dead
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.rules.reductions import MEANS, SUMS
from spcompile.sharding.rules.rule import rule_of

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
_REDUCTIONS = overloads(SUMS + MEANS)


@dataclass(frozen=True)
class WidenSums(Pass):
    """Take in float32 what ranks may sum parts of: reductions, and calls whose result is one number."""

    name: ClassVar[str] = "widen-sums"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-loss"})
    summary: ClassVar[str] = "takes sums, means and losses of half precision in float32, and rounds them at the end"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every sum, mean, and call that sums to one number, whose result is in half precision."""
        matches = [n for n in gm.graph.nodes if n.op == "call_function" and _is_narrow(n)]
        for node in matches:
            wide = _with_dtype(node) if node.target in _REDUCTIONS else _on_wide_operands(node)
            node.replace_all_uses_with(call(gm.graph, aten.to.dtype, (wide, node.meta["val"].dtype), like=node))
        if matches:
            erase_dead(gm)
        return len(matches)


def _is_narrow(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in HALVES:
        return False
    if node.target in _REDUCTIONS:
        return True
    rule = rule_of(node) if value.ndim == 0 and node.target is not aten.to.dtype else None
    return rule is not None and bool(rule.reductions)


def _with_dtype(node: fx.Node) -> fx.Node:
    kwargs = {**node.kwargs, "dtype": torch.float32}
    return call(node.graph, node.target, node.args, kwargs, like=node)  # type: ignore[arg-type]


def _on_wide_operands(node: fx.Node) -> fx.Node:
    """The same call on operands in float32."""

    def widened(operand: fx.Node) -> fx.Node:
        value = operand.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in HALVES:
            return operand
        return call(node.graph, aten.to.dtype, (operand, torch.float32), like=node)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), widened)
    return call(node.graph, node.target, args, kwargs, like=node)  # type: ignore[arg-type]


def _sum_of_halves(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).sum().to(x.dtype)


def _inputs() -> tuple[Any, ...]:
    return (torch.randint(0, 4, (7, 3)).to(torch.float64).requires_grad_(),)  # bfloat16 holds these and their sum


EXAMPLE = Example(_sum_of_halves, _inputs)
