"""Which heads each of several ranks gets, where ranks share out heads instead of rows; for any number of either.

Ranks form a grid: `over_keys` of them split the key heads, `over_queries` the query heads that read one key head. So
every rank has as many query heads for each of its key heads, which is what grouped attention computes. Where numbers do
not divide, some ranks get heads of zeros: nobody reads what becomes of them, so their gradient is zero.

    12 query heads, 3 key heads, 2 ranks    over_queries = 2: 6 query heads and all 3 key heads each
     8 query heads, 2 key heads, 4 ranks    2 x 2: 2 query heads and 1 key head each, every key head on 2 ranks
     5 query heads, 5 key heads, 2 ranks    over_keys = 2: 3 heads each, one of them padding

A dim of N query heads is a product (key head, query head of it), as in grouped attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HeadSplit:
    """The heads of each of `degree` ranks: fewest query heads on a rank, and of such splits fewest key heads.

    heads: query heads, a multiple of kv_heads.
    """

    heads: int
    kv_heads: int
    degree: int

    @cached_property
    def over_keys(self) -> int:
        """Ranks that split the key heads; a divisor of `degree`."""
        return min((n for n in range(1, self.degree + 1) if self.degree % n == 0), key=lambda n: self._on_a_rank(n))

    @property
    def over_queries(self) -> int:
        """Ranks that have the same key heads."""
        return self.degree // self.over_keys

    @property
    def local_heads(self) -> int:
        """Query heads of one rank, padding included."""
        return self._on_a_rank(self.over_keys)[0]

    @property
    def local_kv_heads(self) -> int:
        """Key heads of one rank, padding included."""
        return self._on_a_rank(self.over_keys)[1]

    @property
    def repeats_keys(self) -> bool:
        """Whether some key head goes to several ranks."""
        return self.over_queries > 1

    def _on_a_rank(self, over_keys: int) -> tuple[int, int]:
        keys = math.ceil(self.kv_heads / over_keys)
        return keys * math.ceil(self.heads // self.kv_heads / (self.degree // over_keys)), keys

    def split_queries(self, x: Tensor, dim: int) -> Tensor:
        """[..., heads, ...] -> [degree, ..., local_heads, ...], the heads of rank r at index r; padding is 0."""
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        per_key, local_keys = self.heads // self.kv_heads, self.local_kv_heads
        local_per_key = self.local_heads // local_keys
        grid = (self.over_keys, local_keys, self.over_queries, local_per_key)
        x = x.reshape(*before, self.kv_heads, per_key, *after)
        x = _grown(_grown(x, dim, grid[0] * grid[1]), dim + 1, grid[2] * grid[3])
        x = x.reshape(*before, *grid, *after).movedim((dim, dim + 2), (0, 1))
        return x.reshape(self.degree, *before, self.local_heads, *after)

    def join_queries(self, parts: Tensor, dim: int) -> Tensor:
        """The inverse of `split_queries`; `dim` is that of the result, whose elements may be parts of a larger one."""
        before, after = parts.shape[1 : dim + 1], parts.shape[dim + 2 :]
        per_key, local_keys = self.heads // self.kv_heads, self.local_kv_heads
        local_per_key = self.local_heads // local_keys
        x = parts.reshape(self.over_keys, self.over_queries, *before, local_keys, local_per_key, *after)
        x = x.movedim((0, 1), (dim, dim + 2))
        x = x.reshape(*before, self.over_keys * local_keys, self.over_queries * local_per_key, *after)
        x = _first(_first(x, dim, self.kv_heads), dim + 1, per_key)
        return x.reshape(*before, self.heads, *after)

    def split_keys(self, x: Tensor, dim: int) -> Tensor:
        """[..., kv_heads, ...] -> [degree, ..., local_kv_heads, ...]; padding is 0."""
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        local = self.local_kv_heads
        x = _grown(x, dim, self.over_keys * local).reshape(*before, self.over_keys, local, *after)
        x = x.movedim(dim, 0).unsqueeze(1)
        x = x.expand(self.over_keys, self.over_queries, *before, local, *after)
        return x.reshape(self.degree, *before, local, *after)


def _grown(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def _first(x: Tensor, dim: int, size: int) -> Tensor:
    return x.narrow(dim, 0, size) if x.shape[dim] > size else x
