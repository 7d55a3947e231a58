"""What a model does to its logits between the head and the loss: casts, scales and a softcap, as text.

    "to float32, div 30.0, tanh, mul 30.0"

Steps run one after the other, each in the dtype that its operand has, so that they round as the model's own ops do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LogitStep(NamedTuple):
    """One op on every logit. op: "to", "mul", "div" or "tanh"; value: a dtype's name or a number, as text."""

    op: str
    value: str = ""

    @property
    def number(self) -> float:
        """The factor or divisor."""
        return float(self.value)

    @property
    def dtype(self) -> torch.dtype:
        """What a cast makes."""
        return getattr(torch, self.value)


@dataclass(frozen=True)
class LogitSteps:
    """The steps in order."""

    steps: tuple[LogitStep, ...] = ()

    @classmethod
    def parse(cls, text: str) -> LogitSteps:
        """The steps that a text says."""
        return cls(tuple(LogitStep(*step.split(" ")) for step in text.split(", ") if step))

    def __str__(self) -> str:
        return ", ".join(" ".join(filter(None, step)) for step in self.steps)

    def behind(self, step: LogitStep) -> LogitSteps:
        """These steps, and one more at their end."""
        return LogitSteps((*self.steps, step))

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """What logits of `dtype` become."""
        casts = [step.dtype for step in self.steps if step.op == "to"]
        return casts[-1] if casts else dtype

    def apply(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """What the steps make of `x`, which is overwritten.

        kept: takes what `gradient` reads, one tensor for each tanh; they stay as they are.
        """
        for step in self.steps:
            if step.op == "to":
                x = x.to(step.dtype)
            elif step.op == "tanh":
                x = torch.tanh(x) if _is_last(x, kept) else x.tanh_()
                if kept is not None:
                    kept.append(x)
            else:
                scale = Tensor.mul if step.op == "mul" else Tensor.div
                scale_in_place = Tensor.mul_ if step.op == "mul" else Tensor.div_
                x = (scale if _is_last(x, kept) else scale_in_place)(x, step.number)
        return x

    def gradient(self, grad: Tensor, dtype: torch.dtype, kept: Sequence[Tensor]) -> Tensor:
        """The gradient of the operand of `apply`, of `dtype`; `grad` is overwritten."""
        dtypes = [LogitSteps(self.steps[:place]).dtype_of(dtype) for place in range(len(self.steps) + 1)]
        remaining = list(kept)
        for step, before, after in reversed(list(zip(self.steps, dtypes[:-1], dtypes[1:], strict=True))):
            grad = grad.to(after)
            if step.op == "to":
                grad = grad.to(before)
            elif step.op == "tanh":
                grad = torch.ops.aten.tanh_backward.default(grad, remaining.pop())
            elif step.op == "mul":
                grad = grad.mul_(step.number)
            else:
                grad = grad.div_(step.number)
        return grad.to(dtype)


def _is_last(x: Tensor, kept: list[Tensor] | None) -> bool:
    """Whether `x` is what was kept last, and must not be overwritten."""
    return bool(kept) and kept is not None and kept[-1] is x
