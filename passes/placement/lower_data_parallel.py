"""lower-data-parallel: what lower does, for axis `dp`.

Before: the shapes of the whole batch. After: those of one rank's rows; the sums over `dp` are collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spcompile.passes.placement.annotate_data_parallel import EXAMPLE as _LOSS
from spcompile.passes.placement.lower import LowerToLocal

EXAMPLE = _LOSS


@dataclass(frozen=True)
class LowerDataParallel(LowerToLocal):
    """Turn the reshards of `dp` into collectives."""

    name: ClassVar[str] = "lower-data-parallel"
    after: ClassVar[frozenset[str]] = frozenset({"insert-data-reshards"})
    summary: ClassVar[str] = "turns the reshards of axis dp into spx collectives"
    axis: ClassVar[str | None] = "dp"
    split_axis: ClassVar[str] = "dp"
