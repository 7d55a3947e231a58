"""Ops that draw random numbers. Every factor is replicated: all ranks draw the whole tensor, as one device would."""

from __future__ import annotations

import torch.fx as fx
from torch import Tensor

from spcompile.sharding.rules.base import OpRule, register, tensor_results
from spcompile.sharding.rules.calls import arguments, overloads
from spcompile.sharding.rules.elementwise import pointwise
from spcompile.sharding.rules.factors import build, factors

SAME_SHAPE = """
    bernoulli bernoulli.p native_dropout rand_like randint_like randn_like
"""
NEW_SHAPE = """
    multinomial rand randint randint.low randn randperm
"""


@register(*overloads("dropout feature_dropout alpha_dropout"))
def dropout(node: fx.Node) -> OpRule | None:
    """`[a] [b] -> [a] [b]`; `a b -> a b` where nothing is dropped."""
    args = arguments(node)
    return _whole(node) if args["train"] and args["p"] else pointwise(node)


@register(*overloads(SAME_SHAPE))
def random_like(node: fx.Node) -> OpRule:
    """`[a] [b] -> [a] [b]`."""
    return _whole(node)


def _whole(node: fx.Node) -> OpRule:
    (operand, value) = next((name, v) for name, v in arguments(node).items() if isinstance(v, Tensor))
    dims = factors(value.shape, replicated=True)
    return build(node, {operand: dims}, [dims for _ in tensor_results(node)])


@register(*overloads(NEW_SHAPE))
def random(node: fx.Node) -> OpRule:
    """`-> [a] [b]`."""
    operands = {name: factors(v.shape, True) for name, v in arguments(node).items() if isinstance(v, Tensor)}
    return build(node, operands, [factors(tensor_results(node)[0].shape, replicated=True)])
