"""Ops that make tensors: `-> a b`. Each rank makes the local shape, where values do not depend on the position."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.elementwise import overwritten
from spcompile.sharding.rules.factors import factors, make_rule
from spcompile.sharding.rules.rule import LocalCall, OpRule, register, tensor_results

CONSTANT = """
    empty.memory_format full ones zeros
"""
CONSTANT_WITH_MODEL = """
    new_empty new_full new_ones new_zeros
"""
LIKE = """
    empty_like full_like ones_like zeros_like
"""
BY_POSITION = """
    arange arange.start arange.start_step eye eye.m linspace tril_indices triu_indices
"""


@register(*overloads(CONSTANT + CONSTANT_WITH_MODEL))
def constant(node: fx.Node) -> OpRule:
    """`-> a b`; of the tensor of a `new_*` only dtype and device are read."""
    out = factors(tensor_results(node)[0].shape)
    operands = {name: factors(v.shape) for name, v in arguments(node).items() if isinstance(v, Tensor)}

    at = len(operands)  # where the size is among the arguments

    def local(call: LocalCall) -> Any:
        split = [(call.factor,) == dims for dims in rule.results[0]]
        sizes = zip(call.args[at], call.shapes[0], split, strict=True)  # sizes that data tell are only in the call
        size = [own if is_split else given for given, own, is_split in sizes]
        return node.target(*call.args[:at], size, *call.args[at + 1 :], **call.kwargs)  # type: ignore[operator]

    rule = make_rule(node, operands, [out], local=local, unread=operands)
    return rule


@register(torch.ops.aten.scalar_tensor.default)
def scalar(node: fx.Node) -> OpRule:
    """`-> ()`."""
    return make_rule(node, {}, [[]])


@register(*overloads(LIKE))
def like(node: fx.Node) -> OpRule | None:
    """`a b -> a b`: only the shape is read."""
    return overwritten(node)


@register(*overloads(BY_POSITION))
def by_position(node: fx.Node) -> OpRule:
    """`-> [a]`."""
    return make_rule(node, {}, [factors(tensor_results(node)[0].shape, replicated=True)])
