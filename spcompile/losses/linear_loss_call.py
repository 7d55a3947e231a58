"""The calls of spx.linear_cross_entropy and of its backward, by the names of their arguments.

... dims of rows, D width, C classes on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spcompile.graph.sizes import Size
from spcompile.graph.typed_call import Operand, TypedCall, value_of
from spcompile.losses.logit_steps import LogitSteps


@dataclass(frozen=True, kw_only=True)
class LinearLoss(TypedCall):
    """What both ops have.

    x [..., D], weight [C, D], bias [C]; labels [...], int64; steps: text of `LogitSteps`.
    ignore_index: the label that counts as no class; any other that is none is an error where the op runs.
    classes: of all ranks. first: the class that this rank's first one is, int32 []; None: 0. Classes of this rank at or
    past `classes` are padding.
    class_weight [classes]: what each logit counts in `total`, on every rank for all classes.
    with_total: whether `total` is wanted.
    """

    x: Operand
    weight: Operand
    bias: Operand = None
    labels: Operand
    class_weight: Operand = None
    first: Operand = None
    classes: int
    steps: str = ""
    ignore_index: int = -100
    with_total: bool = False

    @property
    def logit_steps(self) -> LogitSteps:
        """What is done to the logits."""
        return LogitSteps.parse(self.steps)

    @property
    def sizes(self) -> tuple[Size, Size, Size]:
        """(N rows, D, C)."""
        *rows, width = value_of(self.x).shape
        count: Size = 1
        for size in rows:
            count = count * size
        return count, width, value_of(self.weight).shape[0]


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyCall(LinearLoss):
    """spx.linear_cross_entropy."""

    NAME: ClassVar[str] = "linear_cross_entropy"


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyBackwardCall(LinearLoss):
    """spx.linear_cross_entropy_backward: the gradients of the results, `lse`, and which gradients are wanted."""

    NAME: ClassVar[str] = "linear_cross_entropy_backward"

    grad_lse: Operand
    grad_picked: Operand
    grad_total: Operand = None
    lse: Operand
    x_gradient: bool = True
    weight_gradient: bool = True

    def gradients(self, *results: Any) -> list[Any]:
        """Of every argument of the forward, from this op's results; None of those that have none or are not wanted."""
        found = dict(zip(("x", "weight", "bias"), results, strict=True))
        wanted = {"x": self.x_gradient, "weight": self.weight_gradient, "bias": self.bias is not None}
        forward = self.into(LinearCrossEntropyCall)
        return [found[name] if wanted.get(name) else None for name in forward.named()]
