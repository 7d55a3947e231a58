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
