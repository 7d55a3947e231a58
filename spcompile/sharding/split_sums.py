"""Running sums along a split dim: each rank's own, and in front of them what the chunks before it come to.

A rank sends one number for each of its chunks, where a transpose would send all elements. Backwards the same happens in
reverse, since the gradient of a running sum is a running sum from the end: it follows from the duals of the gather and
the shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.sizes import Size
from spcompile.graph.typed_call import named_arguments
from spcompile.machine.sequence import chunks_per_rank
from spcompile.sharding.layout import layout_of
from spcompile.sharding.propagate import Choice, place_of, space_at
from spcompile.sharding.spaces import leaves
from spcompile.sharding.split_dims import SplitDims

spx = torch.ops.spx


def run_summed_up(
    split: SplitDims, n: fx.Node, choice: Choice, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """A `cumsum` of a dim of which ranks have parts, whose padding is 0.

    The dim may be a product, as of entries and positions: [..., outer, split, inner, ...]. Sums run through all of it.
    """
    layout, example = layout_of(n), n.meta["val"]
    assert layout is not None
    assert layout.call is not None
    dims = [leaves(dim) for dim in layout.dims[0]]
    place = place_of(layout.call.rule.results[0], layout.call, choice)
    assert place is not None
    x: Tensor = named_arguments(n.target, args, kwargs)["self"]
    dim, space = place.dim, space_at(dims, place)
    order = split.order_of(space)
    sizes = [factor.size for factor in dims[dim]]
    outer, chunks = math.prod(sizes[: place.part]), chunks_per_rank(order)
    length: Size = split.local(space) // chunks * math.prod(sizes[place.part + 1 :])
    exact = torch.float32 if example.is_floating_point() and example.itemsize < 4 else example.dtype
    own = torch.cumsum(x.reshape([*x.shape[:dim], outer, chunks, length, *x.shape[dim + 1 :]]), dim + 2, dtype=exact)
    ranks = (split.axis, split.degree, order)
    totals = spx.all_gather(own.select(dim + 2, -1), dim + 1, split.degree * chunks, *ranks, "I")
    before = _sums_before(totals.flatten(dim, dim + 1), dim).reshape(totals.shape)
    return (own + spx.shard(before, dim + 1, *ranks, None).unsqueeze(dim + 2)).to(example.dtype).reshape(x.shape)


def _sums_before(x: Tensor, dim: int) -> Tensor:
    """For each element the sum of those in front of it."""
    sums = torch.cumsum(x, dim)
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), sums.narrow(dim, 0, x.shape[dim] - 1)], dim)
