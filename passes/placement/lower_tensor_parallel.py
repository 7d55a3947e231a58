"""lower-tensor-parallel: what lower does, for axis `tp`.

Before: one `cp` rank's shapes with reshards of `tp`. After: the program of one rank of the whole mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spcompile.passes.placement.annotate_tensor_parallel import EXAMPLE as _MLP
from spcompile.passes.placement.lower import LowerToLocal

EXAMPLE = _MLP


@dataclass(frozen=True)
class LowerTensorParallel(LowerToLocal):
    """Trace the graph on the shapes of one rank of `tp`."""

    name: ClassVar[str] = "lower-tensor-parallel"
    after: ClassVar[frozenset[str]] = frozenset({"cancel-collectives"})
    summary: ClassVar[str] = "turns the reshards of axis tp into spx collectives"
    axis: ClassVar[str | None] = "tp"
    split_axis: ClassVar[str] = "tp"
