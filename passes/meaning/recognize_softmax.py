"""recognize-softmax: softmax written out becomes one node.

    e / sum(e)  where e = exp(x)       softmax(x)
    (e @ v) / sum(e)                   softmax(x) @ v
    e / sum(e)  where e = exp(x) * m   softmax(where(m, x, -inf)), for a mask m of bools
    exp(log_softmax(x))                softmax(x)
    x - log(sum(exp(x)))               log_softmax(x)
    x - logsumexp(x)                   log_softmax(x)

Subtracting the row's maximum, as one writes it so that exp does not overflow, changes neither value nor gradient. It is
left behind for recognize-attention, which finds attention around a softmax, and taken out of a log_softmax, which the
loss over a sharded vocabulary reads. Where exp overflows, the written-out form is inf or NaN, the node is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import argument, call, erase_dead, operand, replace, shape_of
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.normalizers import SUM, divided, exponent, normalizer, reduction, weighted
from spcompile.recognition.scores_chain import without_maximum

aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeSoftmax(Pass):
    """Every softmax and log_softmax that is written out becomes a node."""

    name: ClassVar[str] = "recognize-softmax"
    stage: ClassVar[Stage] = Stage.GLOBAL
    summary: ClassVar[str] = "softmax and log_softmax written with exp and sum become one node"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every quotient and difference that is one."""
        rewrites = 0
        for node in list(gm.graph.nodes):
            new = _by_hand_softmax(node) or _of_logarithm(node) or _behind_product(node)
            if new is None and node.target is aten.sub.Tensor and (found := _log_softmax(node)) is not None:
                new = call(gm.graph, aten.log_softmax.int, found, like=node)
            if new is not None:
                replace(node, new)
                rewrites += 1
        if rewrites:
            erase_dead(gm)
        return rewrites


def _by_hand_softmax(node: fx.Node) -> fx.Node | None:
    """E / sum(e)."""
    parts = divided(node)
    return _softmax(*parts, like=node) if parts is not None else None


def _softmax(exponentials: fx.Node, total: fx.Node, like: fx.Node) -> fx.Node | None:
    """The softmax whose exponentials and sum these are."""
    found, weights = reduction(total), weighted(exponentials)
    if found is None or weights is None or found.is_log or found.op is not SUM or found.operand is not exponentials:
        return None
    if not found.is_kept:
        return None
    x = weights.of
    if shape_of(x) != shape_of(exponentials):
        return None
    if weights.mask is not None:
        x = call(like.graph, aten.where.ScalarOther, (weights.mask, x, -math.inf), like=like)
    return call(like.graph, aten.softmax.int, (x, found.dim), like=like)


def _of_logarithm(node: fx.Node) -> fx.Node | None:
    """exp(log_softmax(x))."""
    x = exponent(node)
    if x is None or x.target is not aten.log_softmax.int or argument(x, 2, "dtype") is not None:
        return None
    return call(node.graph, aten.softmax.int, x.args[:2], like=node)


def _behind_product(node: fx.Node) -> fx.Node | None:
    """(e @ v) / sum(e): one number divides each row, before the product or behind it."""
    parts = divided(node)
    if parts is None or parts[0].target not in (aten.matmul.default, aten.bmm.default):
        return None
    exponentials, values = operand(parts[0], 0), operand(parts[0], 1)
    total = reduction(parts[1])
    rank = len(shape_of(exponentials))
    if total is None or total.dim != rank - 1 or len(shape_of(values)) != rank or rank < 2:
        return None
    weights = _softmax(exponentials, parts[1], like=node)
    return call(node.graph, parts[0].target, (weights, values), like=node) if weights is not None else None


def _log_softmax(difference: fx.Node) -> tuple[fx.Node, int] | None:
    x, total = difference.args[:2]
    found = normalizer(total)
    if found is None or found.of is not x or not found.is_kept or argument(difference, 2, "alpha", 1) != 1:
        return None
    return without_maximum(x, found.dim), found.dim


def _by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    exponentials = (x - x.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True), x - x.logsumexp(0).unsqueeze(0)


def _inputs() -> tuple[Tensor]:
    return (torch.randn(3, 5, dtype=torch.float64, requires_grad=True),)


EXAMPLE = Example(_by_hand, _inputs)
