"""spx.linear_cross_entropy: rows split as they are, and classes split as a vocabulary-parallel head has them.

Over split classes every rank computes its own sums, and sends two or three numbers a row: see `vocabulary`.
"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

import spcompile.losses.linear_cross_entropy  # noqa: F401  (defines the op)
from spcompile.losses.linear_loss_call import LinearCrossEntropyCall
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Factor, factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register

Three = tuple[Tensor, Tensor, Tensor]


@register(torch.ops.spx.linear_cross_entropy.default)
def linear_loss(node: fx.Node) -> OpRule:
    """`a b [d], c [d], c, a b, [e] -> a b, a b, a b | c: complete`; classes that are split are not split again.

    Weights of classes are read whole: sums over them stand beside the op.
    """
    args = arguments(node)
    *sizes, width = args["x"].shape
    rows, d, classes = factors(sizes), Factor(width, replicated=True), Factor(args["weight"].shape[0])
    classes.replicated = args["first"] is not None
    operands = {"x": [*rows, d], "weight": [classes, d], "bias": [classes], "labels": rows, "first": []}
    if args["class_weight"] is not None:
        operands["class_weight"] = [Factor(args["class_weight"].shape[0], replicated=True)]
    rule = make_rule(
        node,
        operands,
        [rows] * 3,
        completes=[classes],
        ordered=[classes],
        contracts=[d],
        local=lambda call: run(call),
    )

    def run(call: LocalCall) -> Three:
        own = LinearCrossEntropyCall.bind(*call.args, **call.kwargs)
        return _of_all_ranks(call, own) if call.factor in rule.completed else own.run()

    return rule


def _of_all_ranks(call: LocalCall, own: LinearCrossEntropyCall) -> Three:
    """(lse, picked, total) over the classes of all ranks, on every rank."""
    assert call.ranks is not None
    first = call.ranks.first(call.global_size, own.x.device)
    lse, picked, total = own.but(first=first).run()
    parts = call.ranks.gather(torch.stack([lse, picked, total] if own.with_total else [lse, picked]))
    sums = parts[:, 1:].sum(0)
    return parts[:, 0].logsumexp(0), sums[0], sums[1] if own.with_total else torch.zeros_like(sums[0])
