"""verify in half precision: what it calls equal is what a unit in the last place of every number changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import spcompile
from spcompile import models, verify
from spcompile.passes_api import Context, Pass, Stage

HALVES = [torch.bfloat16, torch.float16]
aten = torch.ops.aten


def gpt(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 16))
    return models.build("gpt-tiny").to(dtype), {"ids_BS": ids, "labels_BS": ids}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_right_program_agrees(dtype: torch.dtype) -> None:
    model, inputs = gpt(dtype)
    report = verify(model, inputs, mesh={"cp": 2})
    assert report.ok, str(report)
    assert report.tolerance < 0.25


@dataclass(frozen=True)
class Scaled(Pass):
    """Multiplies every loss by 1.03, which 5e-2 would call equal."""

    name: ClassVar[str] = "scaled"
    stage: ClassVar[Stage] = Stage.GLOBAL

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        (loss,) = [n for n in gm.graph.nodes if n.target is aten.cross_entropy_loss.default]
        with gm.graph.inserting_after(loss):
            wrong = gm.graph.call_function(aten.mul.Tensor, (loss, 1.03))
        wrong.meta = dict(loss.meta)
        loss.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)
        return 1


@pytest.mark.thinned(10)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_loss_that_is_three_percent_off_is_wrong(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    at = next(i for i, p in enumerate(spcompile.passes.PIPELINE) if p.name == "recognize-loss") + 1
    passes = spcompile.passes.PIPELINE
    monkeypatch.setattr(spcompile.passes, "PIPELINE", (*passes[:at], Scaled(), *passes[at:]))
    model, inputs = gpt(dtype)
    report = verify(model, inputs, mesh={"cp": 2})
    assert next(row.kind for row in report.rows if not row.ok) == "output"
    assert report.culprit is not None
    assert report.culprit.pass_name == "scaled"


class Cancelling(nn.Module):
    """The sum of a difference of two results that are nearly equal: noise is the most part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.linspace(1, 2, 8).bfloat16()) for _ in range(2))

    def forward(self, h: Tensor) -> Any:
        h = nn.functional.scaled_dot_product_attention(h, h, h)
        return (h * self.a - h * self.b).float().sum() + 0.001


def test_what_is_noise_for_the_most_part_is_named() -> None:
    torch.manual_seed(0)
    report = verify(Cancelling(), (torch.rand(1, 1, 16, 8).bfloat16(),), mesh={"cp": 2})
    assert any(note.startswith("rounding moves output") for note in report.notes)


@pytest.mark.thinned(9)
def test_a_given_tolerance_stays() -> None:
    """The plain loss is rounded more often: one unit in its last place."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 32))
    model = models.build("llama-tiny").bfloat16()
    report = verify(model, {"ids_BS": ids, "labels_BS": ids}, mesh={"cp": 2}, tolerance=1e-6)
    assert report.tolerance == 1e-6
    assert not report.ok
    report = verify(model, {"ids_BS": ids, "labels_BS": ids}, mesh={"cp": 2}, tolerance=0.1)
    assert report.ok
