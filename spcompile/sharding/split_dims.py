"""The layout of index spaces over one mesh axis, and what is done along the dims that are split over it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spcompile.graph.reshard import Place
from spcompile.graph.sizes import Size, divides, same
from spcompile.machine.sequence import chunks_per_rank, local_length
from spcompile.sharding.propagate import space_at
from spcompile.sharding.spaces import Space

spx = torch.ops.spx

# What padding holds behind attention, windows and a reduce-scatter. Nobody reads what becomes of it, but with 0 an op
# like x / x.norm() would make NaN, and NaN times the zero gradient of such rows would reach the gradients of
# parameters. Where rows enter, padding repeats the last row: as finite as a real one, and an index that is in range.
BENIGN = 1.0


class SplitDims:
    """The layout of every index space over one mesh axis."""

    def __init__(self, axis: str, degree: int, order: str) -> None:
        self.axis, self.degree, self.order = axis, degree, order

    def capacity(self, space: Space) -> Size:
        """Global length that the layout is computed from: the space's own, or that of the longer space it begins."""
        return space.family().size

    def order_of(self, space: Space) -> str:
        """The order over ranks: that of the sequence, unless the space only takes its place for a while."""
        return "contiguous" if space.family().takes_turns else self.order

    def local(self, space: Space) -> Size:
        """Indices of a split space that one rank holds, padding included."""
        return local_length(self.capacity(space), self.degree, self.order_of(space))

    def whole(self, space: Space) -> Size:
        """Indices of a split space over all ranks."""
        return space.find().size

    def padded(self, space: Space) -> bool:
        """Whether some rank may hold padding."""
        chunks = self.degree * chunks_per_rank(self.order_of(space))
        return not (same(self.capacity(space), space.find().size) and divides(chunks, space.find().size))

    def length_and_unit(self, dim: list[Space]) -> tuple[Size, Size]:
        """Of the layout of a dim whose first factor is split."""
        outer, *inner = dim
        return self.capacity(outer), math.prod(space.find().size for space in inner)

    def on_split_dim(self, x: Tensor, dims: list[list[Space]], place: Place, is_local: bool, function: Any) -> Tensor:
        """Apply function(x, dim, space) to the tensor dim that holds just the split space.

        Where that space is one factor of a compound dim, the dim is unflattened first and flattened again after.
        """
        dim = dims[place.dim]
        space = space_at(dims, place)
        if len(dim) == 1:
            return function(x, place.dim, space)
        sizes: list[Size] = [factor.size for factor in dim]
        if is_local:
            sizes[place.part] = self.local(space)
        before, after = list(x.shape[: place.dim]), list(x.shape[place.dim + 1 :])
        result = function(x.reshape([*before, *sizes, *after]), place.dim + place.part, space)
        sizes[place.part] = result.shape[place.dim + place.part]
        flat: Size = 1
        for size in sizes:
            flat = flat * size
        return result.reshape([*before, flat, *after])

    def gather(self, x: Tensor, dim: int, space: Space, to: str) -> Tensor:
        """S -> R or S -> I, cut to the space's own length."""
        capacity, length = self.capacity(space), space.find().size
        whole = spx.all_gather(x, dim, capacity, self.axis, self.degree, self.order_of(space), to)
        return whole if same(capacity, length) else whole.narrow(dim, 0, length)

    def mask_benignly(self, x: Tensor, dim: int, space: Space) -> Tensor:
        """Padding that an op left at 0 gets a value that may be divided by."""
        return spx.mask_padding(x, dim, space.find().size, self.axis, self.degree, self.order_of(space), BENIGN)
