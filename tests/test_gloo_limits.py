"""Programs that gloo must run one collective after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spcompile import models
from spcompile.gloo_limits import ORDERING, one_after_the_other_on_gloo
from spcompile.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes.lower_collectives import axes_of
from spcompile.program import LocalProgram, build


def program_of(mesh: dict[str, int], attention: Any) -> LocalProgram:
    found: list[LocalProgram] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(build(gm, inputs, MeshShape.of(mesh), Options(attention=attention), PIPELINE))
        return gm.forward

    ids = torch.randint(64, (1, 16))
    torch.compile(models.build("llama-tiny", layers=1), backend=backend)(ids, ids)
    return found[0]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("mesh", "attention", "overlaps"),
    [
        ({"cp": 2}, "ulysses", True),
        ({"tp": 2, "cp": 2}, "ring", True),
        ({"tp": 2, "cp": 2}, "ulysses", False),
        ({"cp": 4}, {"ulysses": 2, "ring": 2}, False),
    ],
    ids=str,
)
def test_what_is_overlapped(mesh: dict[str, int], attention: Any, overlaps: bool) -> None:
    program = program_of(mesh, attention)
    one_after_the_other_on_gloo(program, axes_of(program.gm.graph))
    assert any(p.name == ORDERING for p in program.schedule) == overlaps
    assert any(remark.code == "SPR206" for remark in program.ctx.remarks.rows) != overlaps
