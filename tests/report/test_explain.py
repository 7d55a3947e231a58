"""`explain`: a model that is left as it was, what it may be given, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from explained import Model, plan_of
from torch import Tensor, nn

from spcompile import explain
from spcompile.command import cli
from spcompile.diagnostics import CaptureFailed, GraphBreak, IllegalMesh, StrictRemark, UnknownOption
from spcompile.report.plan import Plan


def figures(plan: Plan) -> dict[str, Any]:
    """What must not depend on where the weights are."""
    found = plan.to_dict()
    for row in found["passes"]:
        del row["milliseconds"]
    return found


@pytest.mark.thinned(8)
def test_weights_may_be_real_or_on_meta_and_stay_untouched() -> None:
    model = Model()
    ids = torch.zeros(1, 64, dtype=torch.int64)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(ids)
    before = {name: p.clone() for name, p in model.named_parameters()}
    real = explain(model, {"ids_BS": ids}, mesh={"cp": 2})
    assert figures(real) == figures(plan_of(2))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(ids), expected)


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_weights_may_be_fake() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model, ids = Model(), torch.zeros(1, 64, dtype=torch.int64)
    fake = explain(model, {"ids_BS": ids}, mesh={"cp": 2})
    assert figures(fake) == figures(plan_of(2))


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_many_plans_of_one_model_do_not_meet_a_recompile_limit() -> None:
    with torch.device("meta"):
        model = Model(layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for length in (16, 24, 40):
            ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
            plan = explain(model, (ids,), mesh={"cp": 2})
            assert plan.sharding.length == length
            assert plan.symbols == {}


@pytest.mark.thinned(2)
def test_inference_has_a_forward_only() -> None:
    with torch.no_grad():
        plan = plan_of(2)
    assert {row.phase for row in plan.collectives} <= {"inference"}
    assert plan.memory.saved_activation_bytes == plan.memory.gradient_bytes == 0
    assert "return" in plan.graph("forward")


@pytest.mark.thinned(3)
def test_errors() -> None:
    class Broken(Model):
        def forward(self, ids_BS: Tensor) -> Tensor:
            loss = super().forward(ids_BS)
            torch._dynamo.graph_break()
            return loss * 2

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    ids = torch.zeros(1, 64, dtype=torch.int64)
    with pytest.raises(GraphBreak, match="graph_break"):
        explain(Broken(), (ids,), mesh={"cp": 2})
    with pytest.raises(CaptureFailed, match="nothing to compile"):
        explain(Nothing(), (ids,), mesh={"cp": 2})
    with pytest.raises(UnknownOption):
        explain(Model(), (ids,), mesh={"cp": 2}, atention="ring")
    for mesh in ({"sp": 2}, {"cp": 0}, 8):
        with pytest.raises(IllegalMesh, match="legal"):
            explain(Model(), (ids,), mesh=mesh)  # type: ignore[arg-type]
    with pytest.raises(StrictRemark):
        plan_of(3, attention="hybrid", strict=True)
    with pytest.raises(ValueError, match="the model's own"):
        explain(Raises(), (ids,), mesh={"cp": 2})


class Raises(Model):
    def forward(self, ids_BS: Tensor) -> Tensor:
        if ids_BS.shape[1] != 7:
            raise ValueError("the model's own")
        return super().forward(ids_BS)


def test_import_is_cheap() -> None:
    code = "import sys, spcompile; spcompile.explain, spcompile.verify; print([m for m in sys.modules if 'torch' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.thinned(10)
def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def call(words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["spcompile", *words.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    page = tmp_path / "plan.html"
    model = "models:llama-tiny --mesh cp=2 --seq 32 --set layers=1"
    assert call(f"explain {model} --attention ring --outputs loss --json --html {page}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["attention"] == "ring"
    assert "ring_attention" in {row["op"] for row in found["collectives"]}
    assert page.read_text().startswith("<!doctype html>")
    assert call(f"explain {model} --graph annotate-context-parallel") == 0
    assert "after annotate-context-parallel" in capsys.readouterr().out
    assert call(f"explain {model} --graph nothing") == 2
    assert capsys.readouterr().err.startswith("SP102")
    assert call(f"verify {model} --json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
