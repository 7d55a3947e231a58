"""Lengths for which Dynamo has a symbol, down to those that leave one row on a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx

from spcompile import models
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.trace import compile_for
from spcompile.program.whole_batch import over_whole_batch


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"cp": 2}], ids=str)
def test_a_length_of_two_after_others(mesh: dict[str, int]) -> None:
    """There torch asks whether a part has one row, which ties the symbol to 2 in the middle of a trace."""
    lengths: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        traced = compile_for(gm, inputs, MeshShape.of(mesh), Options(compiler="eager"), PIPELINE, keep_texts=False)
        ids = next(x for x in traced.program.inputs if isinstance(x, torch.Tensor) and not x.is_floating_point())
        lengths.append("symbol" if isinstance(ids.shape[1], torch.SymInt) else str(ids.shape[1]))
        return gm

    run = torch.compile(models.build("gpt-tiny", layers=1), backend=over_whole_batch(backend, 1))
    for length in (17, 5, 2, 9):
        ids_BS = torch.randint(0, 50, (2, length))
        run(ids_BS, ids_BS)
    assert len(lengths) <= 3, lengths
