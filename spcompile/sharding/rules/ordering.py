"""Ops in which the order of the elements along a dim matters: `a [b] -> a [b]`."""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.sharding.rules.calls import arguments, overloads
from spcompile.sharding.rules.factors import Factor, factors, make_rule
from spcompile.sharding.rules.mixing import mixed
from spcompile.sharding.rules.rule import OpRule, register

ALONG_ONE_DIM = """
    argsort argsort.stable cummax cummin cumprod cumsum logcumsumexp sort sort.stable
"""


@register(*overloads(ALONG_ONE_DIM))
def scan(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`."""
    return mixed(node, [arguments(node)["dim"]])


@register(*overloads("flip roll"))
def move(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`; a roll without dims runs over the flattened tensor."""
    args = arguments(node)
    flattened = node.target is torch.ops.aten.roll.default and not args["dims"]
    return mixed(node, list(range(args["self"].ndim)) if flattened else args["dims"])


@register(torch.ops.aten.topk.default)
def topk(node: fx.Node) -> OpRule:
    """`a [c] -> a [b], a [b]`."""
    args = arguments(node)
    dims = factors(args["self"].shape)
    if not dims:
        return make_rule(node, {"self": dims}, [[], []])
    out = list(dims)
    dims[args["dim"]].replicated = True
    out[args["dim"]] = Factor(args["k"], replicated=True)
    return make_rule(node, {"self": dims}, [out, out])
