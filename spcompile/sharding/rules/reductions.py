"""Ops that drop or shrink dims: `a b -> a | b: sum`, `a [b] -> a`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import arguments
from spcompile.sharding.rules.factors import Dim, Factor, factors, make_rule
from spcompile.sharding.rules.rule import Dims, LocalCall, OpRule, Size, register, tensor_results

SUMS = """
    count_nonzero count_nonzero.dim_IntList nansum sum sum.dim_IntList
"""
MEANS = """
    mean mean.dim
"""
OTHERS = """
    all all.dim all.dims aminmax any any.dim any.dims argmax argmin kthvalue linalg_norm logsumexp max max.dim median
    median.dim min min.dim mode prod prod.dim_int special_logsumexp std std.correction std.dim std_mean
    std_mean.correction std_mean.dim var var.correction var.dim var_mean var_mean.correction var_mean.dim
"""


def reduced_dims(node: fx.Node) -> list[int]:
    """The dims that a reduction runs over, counted from the front; no `dim` or an empty one means all."""
    args = arguments(node)
    dim = args.get("dim")
    dims = [dim] if isinstance(dim, int) else dim
    rank = args["self"].ndim
    return sorted(d % rank for d in dims) if dims and rank else list(range(rank))


def reduce_dims(
    node: fx.Node, *, sums: bool = False, merges: bool = False, local: Any = None, fill: float = 0.0
) -> OpRule | None:
    """The rule of a reduction over `reduced_dims`; None for an overload that reads `dim` in another way.

    sums: parts give terms of a sum. merges: `local` merges what parts give, where padding holds `fill`.
    """
    args = arguments(node)
    dims = factors(args["self"].shape)
    over = reduced_dims(node)
    for d in over:
        dims[d].replicated = not (sums or merges)
    shapes = [result.shape for result in tensor_results(node)]
    kept: list[Dim] = [() if d in over else factor for d, factor in enumerate(dims)]
    out = kept if len(shapes[0]) == len(dims) and over else [dims[d] for d in range(len(dims)) if d not in over]
    if any(len(shape) != len(out) or not all(map(same, shape, map(_size, out))) for shape in shapes):
        return None
    reduced = [dims[d] for d in over]
    return make_rule(
        node,
        {"self": dims},
        [out for _ in shapes],
        sums=reduced if sums else (),
        merges=reduced if merges else (),
        fills={"self": fill},
        local=local,
    )


def _size(dim: Dim) -> Size:
    return dim.size if isinstance(dim, Factor) else 1


@register(*overloads(SUMS))
def sum_(node: fx.Node) -> OpRule | None:
    """`a b -> a | b: sum`."""
    return reduce_dims(node, sums=True)


@register(*overloads(MEANS))
def mean(node: fx.Node) -> OpRule | None:
    """`a b -> a | b: sum`: each rank divides its sum by the global number of elements."""
    over = reduced_dims(node)

    def local(call: LocalCall) -> Any:
        assert rule is not None
        args = named_arguments(node.target, call.args, call.kwargs)
        count = global_count(call, args["self"].shape, rule.operands[0], rule, over)
        return partial_mean(args["self"], over, count, bool(args.get("keepdim")), args["dtype"])

    rule = reduce_dims(node, sums=True, local=local)
    return rule


def partial_mean(x: Tensor, dims: list[int], count: Size, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """The sum of `x` over `dims`, divided by `count`."""
    dtype = dtype or x.dtype
    exact = torch.float32 if dtype.itemsize < 4 else dtype  # a half-precision sum may overflow where its mean does not
    return (torch.sum(x, dim=dims, keepdim=keepdim, dtype=exact) / count).to(dtype)


def global_count(call: LocalCall, local_shape: Sequence[Size], layout: Dims, rule: OpRule, dims: list[int]) -> Size:
    """How many elements the global tensor has in `dims`, in sizes that are known where the local graph is traced."""
    count: Size = 1
    for dim in dims:
        sizes = [call.global_size if name == call.factor else rule.sizes[name] for name in layout[dim]]
        known = call.factor in layout[dim] or all(isinstance(size, int) for size in sizes)
        for size in sizes if known else [local_shape[dim]]:
            count = count * size
    return count


@register(*overloads(OTHERS))
def reduction(node: fx.Node) -> OpRule | None:
    """`a [b] -> a`: not a sum of what the shards give."""
    return reduce_dims(node)
