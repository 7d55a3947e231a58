"""Ops that communicate: one file each, with dual, bytes and meaning for all ranks."""

from __future__ import annotations

from spcompile.collectives import positions as _positions  # noqa: F401  (defines spx::positions)
from spcompile.collectives.all_gather import ALL_GATHER
from spcompile.collectives.all_reduce import ALL_REDUCE
from spcompile.collectives.all_to_all import ALL_TO_ALL
from spcompile.collectives.collective import (
    COLLECTIVES,
    GRADIENT,
    Call,
    Collective,
    call_arguments,
    is_start,
)
from spcompile.collectives.gather_on_gloo import gathers_on_gloo
from spcompile.collectives.halo import HALO
from spcompile.collectives.halo_sum import HALO_SUM
from spcompile.collectives.mask_padding import MASK_PADDING
from spcompile.collectives.move import MOVE
from spcompile.collectives.pick import PICK
from spcompile.collectives.place import PLACE
from spcompile.collectives.reduce_scatter import REDUCE_SCATTER
from spcompile.collectives.reorder import REORDER
from spcompile.collectives.shard import SHARD
from spcompile.collectives.vary import VARY, erase_identities

__all__ = [
    "ALL_GATHER",
    "ALL_REDUCE",
    "ALL_TO_ALL",
    "COLLECTIVES",
    "GRADIENT",
    "HALO",
    "HALO_SUM",
    "MASK_PADDING",
    "MOVE",
    "PICK",
    "PLACE",
    "REDUCE_SCATTER",
    "REORDER",
    "SHARD",
    "VARY",
    "Call",
    "Collective",
    "call_arguments",
    "erase_identities",
    "gathers_on_gloo",
    "is_start",
]
