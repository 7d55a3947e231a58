"""`spx::positions`: where in the whole sequence each local element stands. Needs the rank, so it is an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.collectives.collective import _LIBRARY, rank_in
from spcompile.machine import sequence

_LIBRARY.define(
    "positions(SymInt length, str axis, int degree, str order, int inner=1, *, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _positions(length: int, axis: str, degree: int, order: str, inner: int = 1, *, device: torch.device) -> Tensor:
    """int32 [inner * local_length]; entries >= length are padding. inner: see `sequence.positions`."""
    return sequence.positions(length, rank_in(axis), degree, order, device, inner)


@torch.library.register_fake("spx::positions", lib=_LIBRARY)
def _fake(length: Any, axis: str, degree: int, order: str, inner: int = 1, *, device: torch.device) -> Tensor:
    rows = inner * sequence.local_length(length, inner * degree, order)
    return torch.empty(rows, dtype=torch.int32, device=device)


_LIBRARY.impl("positions", _positions, "CompositeExplicitAutograd")
