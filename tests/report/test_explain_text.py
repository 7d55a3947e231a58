"""`explain`: its text, its dict, its page and the graphs in it tell the same, escaped."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from explained import plan_of

from spcompile import explain
from spcompile.diagnostics import BatchNotSplit


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_graphs_have_the_same_size_for_every_degree() -> None:
    few, many = (plan_of(degree, 1024, attention="ring") for degree in (2, 512))
    for phase in ("forward", "backward"):
        assert len(nodes_of(few.graph(phase))) == len(nodes_of(many.graph(phase)))
    rewrites = [[row.rewrites for row in p.passes if row.name != "overlap-collectives"] for p in (few, many)]
    assert rewrites[0] == rewrites[1]


def nodes_of(text: str) -> list[str]:
    """Without comments: a user's line is repeated wherever it goes on behind another."""
    return [line for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.thinned(5)
def test_the_text_and_the_dict_tell_the_same() -> None:
    plan = plan_of(2, attention="ring")
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["schema_version"] == 1
    assert found["mesh"] == {"cp": 2}
    assert {"collectives", "memory", "remarks", "passes", "largest_tensors"} <= set(found)
    assert set(found["collectives"][0]) == {"op", "axis", "phase", "count", "bytes", "layer", "source", "origin"}
    assert set(found["largest_tensors"][0]) >= {"name", "shape", "numel", "dtype", "source"}
    text = str(plan)
    for row in found["passes"]:
        assert row["name"] in text
    for row in found["collectives"]:
        assert row["op"] in text
    for remark in plan.remarks:
        assert remark.text in text
    assert "64 tokens, 32 on each rank, zigzag order" in text
    assert "2 x ring" in text


@pytest.mark.thinned(3)
def test_graphs_by_pass() -> None:
    plan = plan_of(2, attention="ring")
    assert "spx.attention" in plan.graph("annotate-context-parallel")
    assert "cp=S(1)" in plan.graph("annotate-context-parallel")
    assert "spx.ring_attention(" in plan.graph("forward")
    assert "spx.ring_attention_backward(" in plan.graph("backward")
    assert "backward" not in plan.graph("lower-collectives")
    with pytest.raises(KeyError, match="annotate-context-parallel"):
        plan.graph("nothing")


@pytest.mark.thinned(2)
def test_a_model_from_exec_has_no_lines_and_its_names_are_shown_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        setattr(self, NAME, torch.nn.Linear(8, 8))
    def forward(self, x):
        h = getattr(self, NAME)(x)[:, None]
        y = torch.nn.functional.scaled_dot_product_attention(h, h, h)
        return y.index_select(2, x[0, :, 0].argsort())
"""
    escape = "\x1b]0;title\x07\n"
    notebook = ModuleType("notebook")  # Dynamo looks up what a model reads of its module
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    notebook.NAME = f"linear{escape}"  # type: ignore[attr-defined]
    exec(source, vars(notebook))
    model = type(f"Model{escape}", (vars(notebook)["Model"],), {})()
    plan = explain(model, (torch.ones(2, 8, 8),), mesh={"cp": 2})
    assert [remark.where for remark in plan.remarks] == [None, None]
    plan.save(str(tmp_path / "plan.html"))
    for text in (str(plan), plan.graph("capture"), (tmp_path / "plan.html").read_text()):
        assert "trace.py" not in text
        assert not set(re.sub(r"[\n]", "", text)) & set(map(chr, (*range(32), 127)))
    assert str(plan).startswith(r"Model\x1b]0;title\x07\n on mesh cp=2")


def test_what_is_refused_of_a_model_from_exec_points_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        h = x[:, None]
        y = torch.nn.functional.scaled_dot_product_attention(h, h, h)
        return y, torch.arange(x.shape[0])
"""
    notebook = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    exec(source, vars(notebook))
    with pytest.raises(BatchNotSplit) as error:
        explain(vars(notebook)["Model"](), (torch.ones(4, 8, 8, requires_grad=True),), mesh={"dp": 2})
    assert error.value.where is None
