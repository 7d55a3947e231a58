"""insert-tensor-reshards: what insert-reshards does, for axis `tp`: partial sums are completed by AllReduces.

Before: calls that run over split features read and give values in other states than their neighbours want. After:
every change of state is a node. This is Megatron without sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spcompile.passes.placement.annotate_tensor_parallel import EXAMPLE as _MLP
from spcompile.passes.placement.insert_reshards import InsertReshards

EXAMPLE = _MLP


@dataclass(frozen=True)
class InsertTensorReshards(InsertReshards):
    """Insert the reshards of axis `tp`."""

    name: ClassVar[str] = "insert-tensor-reshards"
    after: ClassVar[frozenset[str]] = frozenset({"annotate-tensor-parallel"})
    summary: ClassVar[str] = "makes every reshard of axis tp a node; sums are completed by AllReduces"
    axis: ClassVar[str | None] = "tp"
    split_axis: ClassVar[str] = "tp"
