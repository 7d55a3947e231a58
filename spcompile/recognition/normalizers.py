"""What a softmax divides by, written out: a sum over one dim, log(sum(exp(x))), logsumexp(x)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from spcompile.graph.edit import argument, is_tensor, operand, shape_of

aten = torch.ops.aten
SUM, LOGSUMEXP = aten.sum.dim_IntList, aten.logsumexp.default


@dataclass(frozen=True)
class Reduction:
    """A sum or logsumexp of `operand` over `dim`, which is kept with size 1 or dropped; is_log: its logarithm."""

    op: Any
    operand: fx.Node
    dim: int
    is_kept: bool
    is_log: bool


class Normalizer(NamedTuple):
    """log(sum(exp(of))) over `dim`, which is kept with size 1 or dropped."""

    of: fx.Node
    dim: int
    is_kept: bool


def reduction(node: Any) -> Reduction | None:
    """The sum or logsumexp that this is, through a logarithm and a dim that is put back or dropped later."""
    if not is_tensor(node):
        return None
    moved, is_log = [], False
    while node.target in (aten.log.default, aten.unsqueeze.default, aten.squeeze.dim):
        if node.target is aten.log.default:
            if is_log:
                return None
            is_log = True
        else:
            moved.append(node)
        node = node.args[0]
    if node.target not in (SUM, LOGSUMEXP) or node.kwargs.get("dtype") is not None:
        return None
    dims, x = argument(node, 1, "dim"), operand(node, 0)
    if not isinstance(dims, list | tuple) or len(dims) != 1 or len(moved) > 1:
        return None
    rank, is_kept = len(shape_of(x)), argument(node, 2, "keepdim", False)
    dim = dims[0] % rank
    for view in moved:
        puts_back = view.target is aten.unsqueeze.default
        if puts_back == is_kept or view.args[1] % rank != dim:
            return None
        is_kept = puts_back
    return Reduction(node.target, x, dim, is_kept, is_log)


def normalizer(node: Any) -> Normalizer | None:
    """The logarithm of a softmax's denominator that this is."""
    found = reduction(node)
    if found is None:
        return None
    if found.op is LOGSUMEXP:
        return None if found.is_log else Normalizer(found.operand, found.dim, found.is_kept)
    x = exponent(found.operand)
    return Normalizer(x, found.dim, found.is_kept) if found.is_log and x is not None else None


def exponent(node: Any) -> fx.Node | None:
    """The x of exp(x)."""
    return operand(node, 0) if is_tensor(node) and node.target is aten.exp.default else None


@dataclass(frozen=True)
class Weighted:
    """exp(`of`), times `mask` of 0 and 1, or of bools, if there is one."""

    of: fx.Node
    mask: fx.Node | None = None


def weighted(node: Any) -> Weighted | None:
    """The exponentials that this is, some of them set to 0 by a product or a fill."""
    x = exponent(node)
    if x is not None:
        return Weighted(x)
    if not is_tensor(node) or node.target is not aten.mul.Tensor or not all(map(is_tensor, node.args[:2])):
        return None
    for left, right in (node.args[:2], node.args[1::-1]):
        x, source = exponent(left), right
        while is_tensor(source) and source.target in (aten.to.dtype, aten._to_copy.default, aten.type_as.default):
            source = source.args[0]
        if x is not None and source.meta["val"].dtype == torch.bool:
            return Weighted(x, source)
    return None


def divided(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The a and b of a / b, also where it is a product with the reciprocal."""
    if not is_tensor(node) or node.target not in (aten.div.Tensor, aten.mul.Tensor):
        return None
    a, b = node.args[:2]
    if node.target is aten.div.Tensor:
        return (a, b) if is_tensor(a) and is_tensor(b) else None
    return next(
        ((x, inverted) for x, y in ((a, b), (b, a)) if is_tensor(x) and (inverted := _inverted(y)) is not None), None
    )


def _inverted(node: Any) -> fx.Node | None:
    """The x of 1 / x."""
    if not is_tensor(node):
        return None
    if node.target is aten.reciprocal.default:
        return operand(node, 0)
    if node.target is aten.mul.Tensor and node.args[1] == 1:  # Python writes 1 / x so
        return _inverted(node.args[0])
    is_power = node.target is aten.pow.Tensor_Scalar and node.args[1] == -1
    is_division = node.target is aten.div.Tensor and node.args[0] == 1
    return operand(node, 0) if is_power else operand(node, 1) if is_division else None
