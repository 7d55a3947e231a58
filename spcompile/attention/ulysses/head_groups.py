"""The heads of a rank in groups, each of which attention computes on its own while the others are on their way.

A rank has heads of a grid (spcompile/attention/ulysses/head_shares.py): key heads, and query heads that read each of
them. Groups cut the key heads where their number divides. Where not they cut the query heads of every key head, and all
groups read the same keys.

     8 query heads, 4 key heads, 2 groups    4 query heads and 2 key heads each
     4 query heads, 1 key head, 2 groups     2 query heads each, the key head in both
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spcompile.attention.ulysses.head_shares import HeadSplit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeadGroups:
    """The heads that every rank of a split has, in `count` groups of equal size; a count for which `divides` holds."""

    split: HeadSplit
    count: int = 1

    @staticmethod
    def divides(split: HeadSplit, count: int) -> bool:
        """Whether the heads of a rank make up so many groups."""
        return split.local_kv_heads % count == 0 or _per_key(split) % count == 0

    @property
    def cuts_keys(self) -> bool:
        """Whether each group has key heads of its own."""
        return self.split.local_kv_heads % self.count == 0

    def queries(self, x: Tensor, dim: int) -> list[Tensor]:
        """[..., local_heads, ...] -> of each group [..., local_heads / count, ...]."""
        if self.count == 1:
            return [x]
        if self.cuts_keys or self.split.local_kv_heads == 1:
            return _equal_parts(x, dim, self.count)
        x = x.unflatten(dim, (self.split.local_kv_heads, _per_key(self.split)))
        return [part.flatten(dim, dim + 1) for part in _equal_parts(x, dim + 1, self.count)]

    def join_queries(self, parts: list[Tensor], dim: int) -> Tensor:
        """The inverse of `queries`."""
        if self.count == 1:
            return parts[0]
        if self.cuts_keys or self.split.local_kv_heads == 1:
            return torch.cat(parts, dim)
        grids = [x.unflatten(dim, (self.split.local_kv_heads, -1)) for x in parts]
        return torch.cat(grids, dim + 1).flatten(dim, dim + 1)

    def keys(self, x: Tensor, dim: int) -> list[Tensor]:
        """[..., local_kv_heads, ...] -> what each group reads."""
        if self.count == 1 or not self.cuts_keys:
            return [x] * self.count
        return _equal_parts(x, dim, self.count)


def _per_key(split: HeadSplit) -> int:
    return split.local_heads // split.local_kv_heads


def _equal_parts(x: Tensor, dim: int, count: int) -> list[Tensor]:
    """Views of equal parts, whose gradients are put together at once."""
    size = x.shape[dim] // count
    return list(x.split(size, dim))
