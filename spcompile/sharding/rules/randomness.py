"""Ops that draw random numbers. Every factor is replicated: all ranks draw the whole tensor, as one device would.

Where every rank has parts of its own, as over dp, it also draws for those, if an op draws each number by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.elementwise import pointwise
from spcompile.sharding.rules.factors import factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

SAME_SHAPE = """
    bernoulli bernoulli.p native_dropout rand_like randint_like randn_like
"""
NEW_SHAPE = """
    rand randint randint.low randn
"""
TOGETHER = """
    multinomial randperm
"""


_FOR_SEVERAL = frozenset(overloads("feature_dropout"))  # one number decides over a whole channel


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
    rule = make_rule(node, {operand: dims}, [dims for _ in tensor_results(node)])
    return rule if node.target in _FOR_SEVERAL else _drawn_apart(rule)


def _drawn_apart(rule: OpRule) -> OpRule:
    return replace(rule, apart=lambda _: replace(rule, replicated=frozenset()))


@register(*overloads(NEW_SHAPE))
def random(node: fx.Node) -> OpRule:
    """`-> [a] [b]`."""
    (at,) = (place for place, arg in enumerate(node.args) if isinstance(arg, (list, tuple)))

    def local(call: LocalCall) -> Any:
        return node.target(*call.args[:at], list(call.shapes[0]), *call.args[at + 1 :], **call.kwargs)  # type: ignore[operator]

    return _drawn_apart(make_rule(node, {}, [factors(tensor_results(node)[0].shape, replicated=True)], local=local))


@register(*overloads(TOGETHER))
def drawn_together(node: fx.Node) -> OpRule:
    """`[a] -> [b]`."""
    operands = {name: factors(v.shape, True) for name, v in arguments(node).items() if isinstance(v, Tensor)}
    return make_rule(node, operands, [factors(tensor_results(node)[0].shape, replicated=True)])
