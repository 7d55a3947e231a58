"""What one device saves, from few layers, is what a program of all layers saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx as fx

from spcompile.capture.meta_device import off_meta
from spcompile.command.model_spec import built_with_inputs
from spcompile.graph.edit import copy_module
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import saved_bytes
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.planning import one_device_saves
from spcompile.planning.one_device_saves import saved_on_one_device
from spcompile.program.emit import cut
from spcompile.program.trace import compile_for, through_dynamo

LAYERS = 8  # of which the first and the last are no others' equals


@pytest.mark.slow
@pytest.mark.thinned(30)
@pytest.mark.parametrize("name", ["llama-tiny", "gpt-tiny", "bert-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_that_of_all_layers(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built, inputs = built_with_inputs(f"models:{name}", 32, 2, dtype, "meta", {"layers": LAYERS})
    found: list[tuple[Any, Any]] = []
    blocks = []
    shorter = one_device_saves.shortened
    monkeypatch.setattr(one_device_saves, "shortened", lambda *args: blocks.append(args[-1]) or shorter(*args))

    def both(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        traced = compile_for(*off_meta(gm, given), MeshShape.of({"cp": 2}), Options(attention="ring"), PIPELINE)
        before = traced.model_itself.gm
        assert before is not None
        program = traced.program
        alone = replace(program, gm=copy_module(before), inputs=program.all_inputs)
        whole = cut(replace(alone, ctx=replace(program.ctx, mesh=MeshShape(()))))
        found.append((saved_on_one_device(traced), saved_bytes(whole)))

    with torch.enable_grad():
        through_dynamo(built, inputs, both)
    ((few, all_),) = found
    assert few == all_
    assert all(keep < LAYERS - 2 for keep in blocks)
    assert blocks or name != "llama-tiny"
