"""The calls of collectives that are looked at one by one, and of spx.positions, by the names of their arguments.

What holds of all collectives reads them through `base.call_arguments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spcompile.collectives.collective import Size
from spcompile.graph.typed_call import Operand, TypedCall


@dataclass(frozen=True, kw_only=True)
class AllGatherCall(TypedCall):
    """spx.all_gather."""

    NAME: ClassVar[str] = "all_gather"

    x: Operand
    dim: int
    length: Size
    axis: str
    degree: int
    order: str
    to: str


@dataclass(frozen=True, kw_only=True)
class ReduceScatterCall(TypedCall):
    """spx.reduce_scatter."""

    NAME: ClassVar[str] = "reduce_scatter"

    x: Operand
    dim: int
    axis: str
    degree: int
    order: str


@dataclass(frozen=True, kw_only=True)
class ShardCall(TypedCall):
    """spx.shard."""

    NAME: ClassVar[str] = "shard"

    x: Operand
    dim: int
    axis: str
    degree: int
    order: str
    fill: float | None


@dataclass(frozen=True, kw_only=True)
class AllToAllCall(TypedCall):
    """spx.all_to_all."""

    NAME: ClassVar[str] = "all_to_all"

    x: Operand
    axis: str
    degree: int
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class VaryCall(TypedCall):
    """spx.vary."""

    NAME: ClassVar[str] = "vary"

    x: Operand
    axis: str
    degree: int


@dataclass(frozen=True, kw_only=True)
class PositionsCall(TypedCall):
    """spx.positions."""

    NAME: ClassVar[str] = "positions"

    length: Size
    axis: str
    degree: int
    order: str
    inner: int = 1
    device: Operand


@dataclass(frozen=True, kw_only=True)
class AllGatherMatmulCall(TypedCall):
    """spx.all_gather_matmul."""

    NAME: ClassVar[str] = "all_gather_matmul"

    x: Operand
    weights: Sequence[Operand]
    dim: int
    length: Size
    axis: str
    degree: int
    gathered: bool
    symmetric: bool = False


@dataclass(frozen=True, kw_only=True)
class MatmulReduceScatterCall(TypedCall):
    """spx.matmul_reduce_scatter."""

    NAME: ClassVar[str] = "matmul_reduce_scatter"

    xs: Sequence[Operand]
    weights: Sequence[Operand]
    shape: Sequence[Size]
    dim: int
    axis: str
    degree: int
    symmetric: bool = False
