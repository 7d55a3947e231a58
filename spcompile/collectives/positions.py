"""`spx::positions`: where in the whole sequence each local element stands. Needs the rank, so it is an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spcompile.collectives.collective import _LIBRARY, rank_in
from spcompile.machine import sequence

_LIBRARY.define(
    "positions(SymInt length, str axis, int degree, str order, *, Device device) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _positions(length: int, axis: str, degree: int, order: str, *, device: torch.device) -> Tensor:
    """int32 [local_length]; entries >= length are padding."""
    return sequence.positions(length, rank_in(axis), degree, order, device)


@torch.library.register_fake("spx::positions", lib=_LIBRARY)
def _fake(length: Any, axis: str, degree: int, order: str, *, device: torch.device) -> Tensor:
    return torch.empty(sequence.local_length(length, degree, order), dtype=torch.int32, device=device)


_LIBRARY.impl("positions", _positions, "CompositeExplicitAutograd")
