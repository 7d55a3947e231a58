"""What the unsharded model saves for its backward, from programs of few of its layers: equal layers save the same."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from spcompile.graph.edit import copy_module
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import saved_bytes
from spcompile.planning.equal_blocks import find_equal_blocks, shortened
from spcompile.planning.search import MORE
from spcompile.program.emit import cut
from spcompile.program.progress import begins
from spcompile.program.trace import Traced

_LEAST = 2  # blocks: the first and the last may save what others do not


def saved_on_one_device(traced: Traced) -> sympy.Expr:
    """Bytes, with the same attention ops and the same partitioner. Call it where `compile_for` is called."""
    begins("forward and backward of one device, to compare")
    before, program = traced.model_itself.gm, traced.program
    assert before is not None
    alone = replace(program, ctx=replace(program.ctx, mesh=MeshShape(())))
    inputs = program.all_inputs
    found = find_equal_blocks(before.graph, ACCELERATORS[program.ctx.options.accelerator])
    least = max(_LEAST, found.least) if found is not None else 0
    if found is None or found.count <= least + MORE or any(isinstance(x, torch.SymInt) for x in inputs):
        return saved_bytes(cut(replace(alone, gm=copy_module(before), inputs=inputs)))
    saved = []
    for keep in (least, least + MORE):
        gm, kept = shortened(before, inputs, found, keep)
        saved.append(saved_bytes(cut(replace(alone, gm=gm, inputs=[inputs[i] for i in kept]))))
    return saved[0] + (saved[1] - saved[0]) * sympy.Rational(found.count - least, MORE)
