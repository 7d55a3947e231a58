"""The calls of those collectives that passes look at one by one, and of spx.positions, by the names of their arguments.

What holds of all collectives reads them through `base.call_arguments`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spcompile.collectives.base import Size
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
    device: Operand
