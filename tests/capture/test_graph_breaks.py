"""Models of several graphs: an error that says all, or each graph sharded on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import broken_models as bm
import data_models as dm
import pytest
import torch
import torch.fx as fx
from oracle import EXACT, default_dtype
from torch import Tensor, nn

import spcompile
from spcompile.diagnostics import GraphBreak, StrictRemark
from spcompile.passes import PIPELINE
from spcompile.passes_api import Context, Pass, Stage

Inputs = tuple[Tensor, ...]


def rows() -> Inputs:
    return (dm.states(),)


MODELS: list[tuple[Callable[[], nn.Module], Callable[[], Inputs], str]] = [
    (bm.BranchesOnValues, rows, "if x.sum() > 0:"),
    (bm.BranchesInLoop, rows, "if x.max() > 1:"),
    (bm.BrokenInside, rows, "if x.sum() > 0:"),
    (bm.CountsPictures, dm.text_with_pictures, "if count != patches_PD.shape[0]:"),
]
NAMES = [build.__name__ for build, *_ in MODELS]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("build", "inputs", "line"), MODELS, ids=NAMES)
@pytest.mark.thinned(9)
def test_the_error_says_why_where_and_what_else(
    build: Callable[[], nn.Module], inputs: Callable[[], Inputs], line: str
) -> None:
    with pytest.raises(GraphBreak) as caught:
        spcompile.explain(build(), inputs(), mesh={"cp": 2})
    assert "Data-dependent branching" in str(caught.value)
    assert 'on_graph_break="gather"' in str(caught.value.legal)
    assert getattr(caught.value.where, "text", "") == line


@pytest.mark.parametrize(("build", "inputs", "line"), MODELS, ids=NAMES)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"cp": 2, "tp": 2}], ids=str)
@pytest.mark.thinned(30)
def test_parts_are_the_plain_model(
    build: Callable[[], nn.Module], inputs: Callable[[], Inputs], line: str, mesh: dict[str, int]
) -> None:
    with default_dtype(torch.float64):
        report = spcompile.verify(build(), inputs(), mesh=mesh, on_graph_break="gather", tolerance=EXACT)
    assert report.ok, str(report)
    assert {row.graph for row in report.rows} == {"parts", "local", "final"}
    found = [remark for remark in report.remarks if remark.code == "SPR105"]
    assert line in [remark.where.text for remark in found if remark.where is not None]
    assert all(remark.where is not None and not remark.where.file.startswith(torch.__path__[0]) for remark in found)


@pytest.mark.thinned(9)
def test_what_crosses_is_counted() -> None:
    plan = spcompile.explain(bm.BranchesOnValues(), rows(), mesh={"cp": 2}, on_graph_break="gather")
    texts = [remark.text for part in (plan, *plan.parts) for remark in part.remarks if remark.code == "SPR105"]
    states = 2 * 9 * 24 * 4
    assert [text.partition("own: ")[2].partition(". ")[0] for text in texts] == [
        f"{states + 1 + 4:,} bytes in 3 tensors leave whole",  # the branch's condition and the buffer among them
        f"{states:,} bytes in 1 tensor come in whole, {2 * states:,} bytes in 2 tensors leave whole",
        f"{2 * states:,} bytes in 2 tensors come in whole",
    ]
    assert "Part 3 of 3" in str(plan)
    assert len(plan.to_dict()["parts"]) == 2


@pytest.mark.thinned(4)
def test_one_graph_behind_a_break_is_one_graph() -> None:
    assert not spcompile.explain(bm.PrintsFirst(), rows(), mesh={"cp": 2}).parts
    with pytest.raises(GraphBreak, match=r"(?s)over dp.*print\(end"):
        spcompile.explain(bm.PrintsFirst(), rows(), mesh={"dp": 2})


@pytest.mark.thinned(6)
@pytest.mark.parametrize("choice", ["error", "gather"])
def test_over_dp_it_is_an_error(choice: str) -> None:
    with pytest.raises(GraphBreak, match="over dp what crosses") as caught:
        spcompile.verify(bm.BranchesOnValues(), rows(), mesh={"dp": 2}, on_graph_break=choice)
    assert "if x.sum() > 0:" in str(caught.value)


@pytest.mark.thinned(4)
def test_strict() -> None:
    with pytest.raises(StrictRemark, match="SPR105"):
        spcompile.explain(bm.BranchesOnValues(), rows(), mesh={"cp": 2}, on_graph_break="gather", strict=True)


@pytest.mark.thinned(7)
def test_without_values_there_is_no_way_past_a_branch() -> None:
    with torch.device("meta"):
        model, x = bm.BranchesOnValues(), torch.ones(2, 9, 24)
    with pytest.raises(GraphBreak, match=r"(?s)without values.*if x.sum\(\) > 0:.*real weights"):
        spcompile.explain(model, (x,), mesh={"cp": 2}, on_graph_break="gather")


@dataclass(frozen=True)
class Scaled(Pass):
    """Multiplies every mean by 1.045, which 5e-2 would call equal."""

    name: ClassVar[str] = "scaled"
    stage: ClassVar[Stage] = Stage.GLOBAL

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        means = [n for n in gm.graph.nodes if n.target is torch.ops.aten.mean.default]
        for mean in means:
            with gm.graph.inserting_after(mean):
                wrong = gm.graph.call_function(torch.ops.aten.mul.Tensor, (mean, 1.045))
            wrong.meta = dict(mean.meta)
            mean.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
        return len(means)


@pytest.mark.parametrize("factor", [1, 1.045])
@pytest.mark.thinned(30)
def test_half_precision(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding makes of the whole model and of each graph is measured, not more: of this loss about 2%, twice."""
    model, x = bm.BranchesOnValues().bfloat16(), dm.states().bfloat16()
    if factor != 1:
        at = next(i for i, p in enumerate(PIPELINE) if p.name == "recognize-loss") + 1
        monkeypatch.setattr(spcompile.passes, "PIPELINE", (*PIPELINE[:at], Scaled(), *PIPELINE[at:]))
    report = spcompile.verify(model, (x,), mesh={"cp": 2}, on_graph_break="gather")
    assert report.ok is (factor == 1), str(report)
    if factor != 1:
        wrong = {(row.graph, row.name) for row in report.rows if not row.ok}
        assert ("parts", "loss") in wrong
        assert report.culprit is not None
        assert report.culprit.pass_name == "scaled"


class KeepsCount(bm.BranchesOnValues):
    """Writes to one buffer, and gives another a new tensor behind all breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        self.last = x[:, 0, 0] * 2
        return found


@pytest.mark.thinned(14)
def test_what_a_broken_model_writes_is_compared() -> None:
    with default_dtype(torch.float64):
        model = KeepsCount()
        report = spcompile.verify(model, rows(), mesh={"cp": 2}, on_graph_break="gather", tolerance=EXACT)
    assert report.ok, str(report)
    names = {row.name for row in report.rows if row.kind == "new value" and row.graph == "parts"}
    assert names == {"calls", "last"}
    assert model.calls == 0


@pytest.mark.thinned(9)
def test_no_limit_of_programs_makes_parts_of_a_model_plain_code() -> None:
    with default_dtype(torch.float64), torch._dynamo.config.patch(recompile_limit=1):
        report = spcompile.verify(bm.BrokenInside(), rows(), mesh={"cp": 2}, on_graph_break="gather")
    parts = {row.name.partition(":")[0] for row in report.rows if row.name.startswith("part ")}
    assert len(parts) == 4
