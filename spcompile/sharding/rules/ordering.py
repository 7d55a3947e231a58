"""Ops in which the order of the elements along a dim matters: `a [b] -> a [b]`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import overloads
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Factor, factors, make_rule
from spcompile.sharding.rules.mixing import mixed
from spcompile.sharding.rules.moving import with_moves
from spcompile.sharding.rules.rule import OpRule, register

ALONG_ONE_DIM = """
    argsort argsort.stable cummax cummin cumprod logcumsumexp sort sort.stable
"""


@register(*overloads(ALONG_ONE_DIM))
def scan(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`."""
    return mixed(node, [arguments(node)["dim"]])


@register(torch.ops.aten.cumsum.default)
def running_sum(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`; where ranks send each other sums of their parts, each has the running sums of its own part."""
    rule = mixed(node, [arguments(node)["dim"]])
    along = rule.replicated
    return replace(rule, moving=replace(rule, replicated=frozenset(), filled=along, summed_up=along))


@register(torch.ops.aten.flip.default)
def flip(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`; where ranks send each other rows, each has those from the other end."""
    rule = mixed(node, arguments(node)["dims"])
    return replace(rule, moving=replace(rule, replicated=frozenset(), mirrored=rule.replicated))


@register(torch.ops.aten.roll.default)
def roll(node: fx.Node) -> OpRule:
    """`a [b] -> a [b]`; without dims it runs over the flattened tensor."""
    args = arguments(node)
    x, dims, shifts = args["self"], args["dims"], args["shifts"]
    rule = mixed(node, dims or range(x.ndim))
    length = x.shape[dims[0]] if len(dims) == 1 else None
    if not isinstance(length, int) or not isinstance(shifts[0], int) or length == 0:
        return rule
    shift = shifts[0] % length
    return with_moves(node, rule, dims[0], [(0, 0, 0, shift, length - shift), (0, 0, length - shift, 0, shift)])


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
