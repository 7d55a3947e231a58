"""lower-data-parallel: what lower does, for axis `dp`, on shapes that are one rank's from the start.

Before: reshards of `dp`. After: the sums over `dp` are collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spcompile.passes.placement.annotate_data_parallel import EXAMPLE as _LOSS
from spcompile.passes.placement.lower import LowerToLocal
from spcompile.passes_api import Context
from spcompile.sharding.lowering import OwnParts, SplitDims

EXAMPLE = _LOSS


@dataclass(frozen=True)
class LowerDataParallel(LowerToLocal):
    """Turn the reshards of `dp` into collectives."""

    name: ClassVar[str] = "lower-data-parallel"
    after: ClassVar[frozenset[str]] = frozenset({"insert-data-reshards"})
    summary: ClassVar[str] = "turns the reshards of axis dp into spx collectives"
    axis: ClassVar[str | None] = "dp"
    split_axis: ClassVar[str] = "dp"

    def split(self, ctx: Context) -> SplitDims:
        """Every rank's part is what it was given."""
        return OwnParts("dp", ctx.mesh.size("dp"), "contiguous", ctx.rows)
