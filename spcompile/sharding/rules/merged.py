"""Reductions of which ranks merge the results of their parts: `a b -> a | b: complete`.

A norm is the norm of the parts' norms, the largest element the largest of the parts' largest. Each rank sends one
number for each of its results, however long the dim is. A gradient goes the way it goes on one device, also at a norm
of 0, and in equal shares to all elements that are largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.reductions import reduce_dims, reduced_dims
from spcompile.sharding.rules.rule import LocalCall, OpRule, register

NORMS = """
    linalg_vector_norm norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype
"""
EXTREMES = """
    amax amin
"""


@register(*overloads(NORMS))
def norm(node: fx.Node) -> OpRule | None:
    """`a b -> a | b: complete` for orders above 0, to which zeros add nothing; of order infinity `a [b] -> a`."""
    args = arguments(node)
    order = args.get("ord", args.get("p"))
    order = 2.0 if order is None else order
    is_sum = isinstance(order, int | float) and 0 < order < math.inf
    over = reduced_dims(node)

    def merged(ranks: Any, given: Mapping[str, Any]) -> Tensor:
        dtype = given.get("dtype") or given["self"].dtype
        exact = torch.float32 if dtype.itemsize < 4 else dtype
        own = torch.linalg.vector_norm(given["self"], order, over, bool(given.get("keepdim")), dtype=exact)
        return torch.linalg.vector_norm(ranks.gather(own), order, [0]).to(dtype)

    return _merging(node, merged, is_sum)


@register(*overloads(EXTREMES))
def extreme(node: fx.Node) -> OpRule | None:
    """`a b -> a | b: complete`; of integers, which padding cannot leave out, `a [b] -> a`."""
    is_largest = node.target is torch.ops.aten.amax.default
    over = reduced_dims(node)

    def merged(ranks: Any, given: Mapping[str, Any]) -> Tensor:
        return _extreme_of_all(ranks, given["self"], over, bool(given.get("keepdim")), is_largest)

    merges = arguments(node)["self"].is_floating_point()
    return _merging(node, merged, merges, -math.inf if is_largest else math.inf)


def _merging(
    node: fx.Node, merged: Callable[[Any, Mapping[str, Any]], Tensor], merges: bool, fill: float = 0.0
) -> OpRule | None:
    """A reduction that over a split dim is merged(ranks, arguments by name), and else itself on a rank's part."""

    def local(call: LocalCall) -> Any:
        assert rule is not None
        if call.factor not in rule.completed:
            return node.target(*call.args, **call.kwargs)  # type: ignore[operator]
        assert call.ranks is not None
        return merged(call.ranks, named_arguments(node.target, call.args, call.kwargs))

    rule = reduce_dims(node, merges=merges, local=local, fill=fill)
    return rule


def _extreme_of_all(ranks: Any, x: Tensor, over: list[int], keepdim: bool, is_largest: bool) -> Tensor:
    """The largest or smallest element over all ranks; those that are equal to it share its gradient."""
    op = torch.amax if is_largest else torch.amin
    fixed = x.detach()
    found = op(ranks.gather(op(fixed, over, keepdim=True)), 0)
    is_found = fixed == found
    counts = ranks.gather(is_found.to(torch.float32).sum(over, keepdim=True)).sum(0)
    # 0 with a gradient of 1 where the element is, unless it is infinite
    change = (x - fixed.where(fixed.isfinite(), 0)).where(is_found & fixed.isfinite(), 0)
    total = ranks.gather(change.sum(over, keepdim=True)).sum(0)
    result = found + total / counts.to(x.dtype).clamp(min=1)
    return result if keepdim else result.squeeze(over)
