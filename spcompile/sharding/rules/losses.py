"""Losses. `reduction="sum"` leaves partial sums; a mean by the number of elements is a sum over the global number.

A cross-entropy's mean divides by the number of valid rows, or by their weights, which no rank knows: its rows are
replicated here, and a pass rewrites it to a sum and a count. Over split classes it is computed in `vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import broadcast_factors, factors, make_rule
from spcompile.sharding.rules.reductions import global_count, partial_mean
from spcompile.sharding.rules.rule import LocalCall, OpRule, register
from spcompile.sharding.rules.vocabulary import vocabulary_parallel

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2  # ATen's codes of `reduction`

CLASSIFICATION = """
    cross_entropy_loss nll_loss nll_loss2d nll_loss_nd
"""
# What a padded element must hold, so that its loss is exactly 0.
ELEMENTWISE: dict[Any, dict[str, float]] = {
    aten.binary_cross_entropy.default: {"self": 0.0, "target": 0.0},
    aten.binary_cross_entropy_with_logits.default: {"self": -1e4, "target": 0.0},
    aten.huber_loss.default: {"self": 0.0, "target": 0.0},
    aten.kl_div.default: {"self": 0.0, "target": 0.0},
    aten.l1_loss.default: {"self": 0.0, "target": 0.0},
    aten.mse_loss.default: {"self": 0.0, "target": 0.0},
    aten.smooth_l1_loss.default: {"self": 0.0, "target": 0.0},
}


@register(*overloads(CLASSIFICATION))
def classification(node: fx.Node) -> OpRule | None:
    """`a [c] b, a b -> a b` without reduction, else `-> ()`; None for targets that are probabilities.

    A cross entropy may have its classes split.
    """
    args = arguments(node)
    dims, target = factors(args["self"].shape), args["target"]
    if target.dtype.is_floating_point or target.ndim != len(dims) - 1:
        return None
    classes = dims[min(1, len(dims) - 1)]
    rows = [factor for factor in dims if factor is not classes]
    is_entropy = node.target is aten.cross_entropy_loss.default
    classes.replicated = not (is_entropy and len(dims) > 1 and args["reduction"] != MEAN and args["weight"] is None)
    for factor in rows:
        factor.replicated = args["reduction"] == MEAN
    operands = {"self": dims, "target": rows, "weight": [classes]}
    out = rows if args["reduction"] == NONE else []
    sums = rows if args["reduction"] == SUM else []

    def local(call: LocalCall) -> Any:
        if call.factor in rule.completed:
            return vocabulary_parallel(call)
        rows, *others = call.args
        # An all-to-all leaves other strides behind; nll_loss2d refuses them: "grad_input must be contiguous".
        rows = rows if is_entropy else rows.contiguous()
        return node.target(rows, *others, **call.kwargs)  # type: ignore[operator]

    fills = {"target": float(args["ignore_index"])}
    rule = make_rule(node, operands, [out], sums=sums, completes=[classes], ordered=[classes], fills=fills, local=local)
    return rule


@register(*ELEMENTWISE)
def elementwise_loss(node: fx.Node) -> OpRule | None:
    """`a b, a b -> () | a: sum, b: sum`; weights broadcast, but both sides must have one shape."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    operands = {name: broadcast_factors(value.shape, dims) for name, value in args.items() if isinstance(value, Tensor)}
    if any(layout is None for layout in operands.values()) or operands["target"] != operands["self"]:
        return None
    if args["reduction"] == NONE:
        return make_rule(node, operands, [dims])
    local = _mean(node, lambda: rule) if args["reduction"] == MEAN else None
    rule = make_rule(node, operands, [[]], sums=dims, fills=ELEMENTWISE[node.target], local=local)
    return rule


def _mean(node: fx.Node, rule: Callable[[], OpRule]) -> Callable[[LocalCall], Any]:
    """The sum of the local losses over the global number of elements."""

    def local(call: LocalCall) -> Any:
        losses = node.target(**{**named_arguments(node.target, call.args, call.kwargs), "reduction": NONE})  # type: ignore[operator]
        every_dim = list(range(losses.ndim))
        count = global_count(call, losses.shape, rule().operands[0], rule(), every_dim)
        return partial_mean(losses, every_dim, count)

    return local
