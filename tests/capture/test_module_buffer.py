"""Buffers that are masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spcompile.capture import module_buffer
from spcompile.capture.module_buffer import Band, band_of

INF = float("inf")
ONES = torch.ones(6, 6)
BANDS: dict[str, tuple[Tensor, Band | None]] = {
    "causal": (ONES.tril(), Band(0, None, 1.0, 0.0)),
    "strictly above": (ONES.triu(1), Band(0, None, 0.0, 1.0)),
    "bools": (ONES.bool().tril(), Band(0, None)),
    "window": (ONES.int().tril().triu(-2), Band(0, 2, 1, 0)),
    "all but a window": (ONES.int() - ONES.int().tril(1).triu(-1), Band(1, 1, 0, 1)),
    "added": (torch.full((6, 6), -INF).triu(1), Band(0, None, 0.0, -INF)),
    "more columns": (torch.ones(3, 6).tril(3), Band(3, None, 1.0, 0.0)),
    "many matrices": (ONES.tril().expand(2, 3, 6, 6), Band(0, None, 1.0, 0.0)),
    "true everywhere": (ONES.bool(), Band(None, None)),
    "one number": (ONES, None),
    "false everywhere": (~ONES.bool(), None),
    "three numbers": (ONES.tril() + torch.eye(6), None),
    "a hole": (ONES.tril() - torch.eye(6).roll(3, 0).tril(), None),
    "other matrices": (torch.stack([ONES.tril(), ONES.tril(1)]), None),
    "blocks": (torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)), None),
    "not a number": (ONES.tril() * float("nan"), None),
    "one dim": (torch.tensor([1.0, 0.0]), None),
    "complex": (ONES.tril().to(torch.complex64), None),
    "nothing": (torch.ones(0, 6), None),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("at_a_time", [1, 12, 1 << 22])
def test_bands(name: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_buffer, "AT_A_TIME", at_a_time)
    buffer, expected = BANDS[name]
    assert band_of(buffer) == expected


def test_parameters_and_tensors_without_values_are_not_read() -> None:
    assert band_of(torch.nn.Parameter(ONES.tril())) is None
    assert band_of(ONES.tril().to("meta")) is None
    assert band_of(ONES.tril().to_sparse()) is None
