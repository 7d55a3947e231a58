"""recognize-loss: a mean over valid tokens becomes a sum and a count.

Before: cross_entropy_loss(logits, target, reduction=mean). After: cross_entropy_loss(reduction=sum) / count of targets
that are not ignored (their summed weights, where classes have weights). A sum can be taken over shards; a mean of
means is another number whenever ranks hold different numbers of valid tokens. So with nll_loss of log-probabilities.
Half precision is widened first: sum, count and quotient are in float32, and the loss is rounded at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import argument
from spcompile.graph.splice import splice
from spcompile.passes_api import Context, Example, Pass, Stage

aten = torch.ops.aten
MEAN, SUM = 1, 2  # at::Reduction
_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default)


@dataclass(frozen=True)
class RecognizeLoss(Pass):
    """Split mean cross entropies with class-index targets."""

    name: ClassVar[str] = "recognize-loss"
    stage: ClassVar[Stage] = Stage.GLOBAL
    summary: ClassVar[str] = "splits a mean cross entropy into a sum and the count of valid tokens"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every cross_entropy_loss and nll_loss with reduction=mean and index targets."""
        matches = [n for n in gm.graph.nodes if n.target in _LOSSES and _is_mean(n)]
        for node in matches:
            logits, target, weight, ignore_index, smoothing = (
                argument(node, 0, "self"),
                argument(node, 1, "target"),
                argument(node, 2, "weight"),
                argument(node, 4, "ignore_index", -100),
                argument(node, 5, "label_smoothing", 0.0),
            )
            total = sum_over_count if node.target is aten.cross_entropy_loss.default else likelihood_over_count
            loss = splice(total, (logits, target, weight, ignore_index, smoothing), like=node)
            node.replace_all_uses_with(loss)
            gm.graph.erase_node(node)
        return len(matches)


def _is_mean(node: fx.Node) -> bool:
    target = argument(node, 1, "target").meta["val"]
    return argument(node, 3, "reduction", MEAN) == MEAN and not target.is_floating_point() and target.ndim >= 1


def sum_over_count(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """The mean cross entropy as a quotient; 0/0 (no valid target) is NaN, as in torch."""
    wide, weight = _widened(logits), _widened(weight)
    total = aten.cross_entropy_loss.default(wide, target, weight, SUM, ignore_index, smoothing)
    return _rounded(_over_count(total, target, weight, ignore_index), logits.dtype)


def likelihood_over_count(
    logs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> Tensor:
    """The mean negative log-likelihood as a quotient; it has no smoothing."""
    assert smoothing == 0
    wide, weight = _widened(logs), _widened(weight)
    total = aten.nll_loss_nd.default(wide, target, weight, SUM, ignore_index)
    return _rounded(_over_count(total, target, weight, ignore_index), logs.dtype)


def _widened(x: Any) -> Any:
    """In float32 at least: kernels count in it, while bfloat16 has no 1001, and float16 nothing over 65504."""
    return x.to(torch.float32) if x is not None and x.dtype.itemsize < 4 else x


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _over_count(total: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    valid = aten.ne.Scalar(target, ignore_index)
    if weight is None:
        return total / aten.sum.default(valid).to(total.dtype)
    weights = aten.index_select.default(weight, 0, aten.where.ScalarOther(valid, target, 0).reshape(-1))
    return total / aten.sum.default(weights * valid.reshape(-1))


def _mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target)


def _inputs() -> tuple[Tensor, Tensor]:
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([1, -100, 3, 0, -100, 4])


EXAMPLE = Example(_mean_loss, _inputs)
