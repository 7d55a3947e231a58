"""Kinds of models of which every rank saves its share, and no more: exact on cp and on tp, in memory as in numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mixing_models import KINDS

import spcompile

MOST = 1.15  # of what one device saves, over the number of ranks
MORE = {("slots", "tp"): 1.25}  # scores of all tokens with all slots are on every rank


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("axis", ["cp", "tp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_saves_its_share(kind: str, axis: str, degree: int) -> None:
    torch.manual_seed(0)
    model, inputs = KINDS[kind]()
    report = spcompile.verify(model, inputs, {axis: degree})
    assert report.ok, str(report)
    if degree == 2:  # which divides all sizes
        torch._dynamo.reset()
        memory = spcompile.explain(model, inputs, {axis: degree}).to_dict()["memory"]
        share = memory["saved_activation_bytes_one_device"] / degree
        assert memory["saved_activation_bytes"] <= MORE.get((kind, axis), MOST) * share
