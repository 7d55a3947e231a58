"""`explain`: figures that are exactly those of the graphs, without devices, and a model that is left as it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import explained
import pytest
import sympy
import torch
from explained import VOCAB, WIDTH, Model, plan_of
from torch import Tensor, nn

from spcompile import explain
from spcompile.command import cli
from spcompile.diagnostics import BatchNotSplit, CaptureFailed, GraphBreak, IllegalMesh, StrictRemark, UnknownOption
from spcompile.report.plan import Plan


def figures(plan: Plan) -> dict[str, Any]:
    """What must not depend on where the weights are."""
    found = plan.to_dict()
    for row in found["passes"]:
        del row["milliseconds"]
    return found


def total(plan: Plan, **wanted: str) -> sympy.Expr:
    rows = [row for row in plan.collectives if all(getattr(row, key) == value for key, value in wanted.items())]
    return sum((row.bytes for row in rows), sympy.Integer(0))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_of_a_causal_ring(degree: int) -> None:
    """Keys and values go once round the ring forward; backward they go again, and float32 gradients once more."""
    length, layers, rows = 64, 2, 3
    plan = plan_of(degree, length, layers, rows, attention="ring")
    message = rows * (length // degree) * 2 * WIDTH * 4
    assert total(plan, op="ring_attention") == layers * (degree - 1) * message
    assert total(plan, op="ring_attention_backward") == layers * (2 * (degree - 1) + 1) * message
    ring = next(row for row in plan.collectives if row.op == "ring_attention")
    assert (ring.axis, ring.phase, ring.count, ring.origin) == ("cp", "forward", layers, "attention")
    assert ring.layer == "layers.*"
    assert ring.source is not None
    assert "scaled_dot_product_attention" in ring.source.text


@pytest.mark.thinned(7)
@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_of_ulysses(degree: int) -> None:
    """q, k, v in one message and the result in another, of each of which 1/degree stays; backward the result again."""
    length, layers = 64, 2
    plan = plan_of(degree, length, layers, attention="ulysses")
    one = layers * (length // degree) * WIDTH * 4 * (degree - 1) // degree
    for phase, tensors, messages in (("forward", 4, 2), ("backward", 4 + 1, 2 + 1)):
        assert total(plan, op="all_to_all", phase=phase) == tensors * one
        rows = [row for row in plan.collectives if (row.op, row.phase) == ("all_to_all", phase)]
        assert sum(row.count for row in rows) == messages * layers
    assert total(plan, origin="activation again") == one


@pytest.mark.thinned(3)
def test_every_parameter_gradient_is_summed_once() -> None:
    plan = plan_of(4)
    size = sum(p.numel() * p.element_size() for p in Model().parameters())
    assert total(plan, origin="parameter gradient", op="all_reduce") == sympy.Rational(2 * 3, 4) * size
    assert plan.memory.parameter_bytes == plan.memory.gradient_bytes == size
    assert plan.memory.peak_bytes > size + plan.memory.saved_activation_bytes


@pytest.mark.thinned(2)
def test_one_rank_sends_nothing_and_saves_what_one_device_saves() -> None:
    plan = plan_of(1)
    assert plan.collectives == []
    assert plan.memory.saved_activation_bytes == plan.memory.saved_activation_bytes_one_device > 0
    assert "SPR401" in {remark.code for remark in plan.remarks}
    assert "not sharded" in str(plan)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_saved_activations_are_divided_by_the_mesh(attention: str) -> None:
    memory = plan_of(4, 256, attention=attention).memory
    ratio = float(memory.saved_activation_bytes_one_device / memory.saved_activation_bytes)
    assert ratio == pytest.approx(4, rel=0.02)


def test_saved_bytes_of_one_device_are_those_that_autograd_saves() -> None:
    """Counted by hand for one linear layer: its input, behind a gelu, and the gelu's input."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    plan = explain(Small(), (torch.randn(2, 5, 8),), mesh={"cp": 2})
    assert plan.memory.saved_activation_bytes == 2 * 5 * 24 * 4
    assert "SPR101" in {remark.code for remark in plan.remarks}
    assert plan.sharding.sharded_ops == 0


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


@pytest.mark.thinned(3)
def test_no_tensor_is_larger_than_a_shard() -> None:
    plan = plan_of(8, 4096, outputs="loss")
    assert plan.largest_tensors[0].numel == 4096 // 8 * max(3 * WIDTH, VOCAB)
    source = plan.largest_tensors[0].source
    assert source is not None
    assert source.file == explained.__file__


@pytest.mark.thinned(6)
def test_a_llama_at_128k_in_a_minute() -> None:
    """On meta, as large as it is: nothing is computed, and no tensor is larger than 1/8 of the largest activation."""
    transformers = pytest.importorskip("transformers")
    length, hidden, ffn, vocab = 131072, 1024, 2816, 32000
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=ffn,
        vocab_size=vocab,
        max_position_embeddings=length,
        use_cache=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.zeros(1, length, dtype=torch.int64)
    plan = explain(model, {"input_ids": ids, "labels": ids}, mesh={"cp": 8}, outputs="loss", attention="ring")
    assert plan.largest_tensors[0].numel <= length // 8 * max(hidden, ffn, vocab)
    assert [row.mask for row in plan.attention] == ["causal"]
    assert sum(row.milliseconds for row in plan.passes) < 60_000


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_figures_of_a_dynamic_length_are_expressions_of_it() -> None:
    with torch.device("meta"):
        model, ids = Model(), torch.zeros(1, 64, dtype=torch.int64)
    static = explain(model, (ids,), mesh={"cp": 2}, attention="ring")
    torch._dynamo.mark_dynamic(ids, 1)
    plan = explain(model, (ids,), mesh={"cp": 2}, attention="ring")
    (symbol,) = plan.symbols
    assert plan.symbols[symbol] == "size 1 of input 0"

    def at_64(size: sympy.Expr) -> int:
        return int(size.subs(dict.fromkeys(size.free_symbols, 64)).doit())

    assert {str(x) for x in plan.memory.saved_activation_bytes.free_symbols} == {symbol}
    kept = ("saved_activation_bytes", "saved_activation_bytes_one_device", "parameter_bytes", "gradient_bytes")
    for name in kept:  # masked copies of padding, which 64 does not have, are not saved
        assert at_64(getattr(plan.memory, name)) == getattr(static.memory, name)
    assert at_64(plan.memory.peak_bytes) > sum(at_64(getattr(plan.memory, name)) for name in (kept[0], *kept[2:]))
    ring = {row.phase: row.bytes for row in plan.collectives if row.origin == "attention"}
    for row in static.collectives:
        if row.origin == "attention":
            assert at_64(ring[row.phase]) == row.bytes
    assert isinstance(json.loads(json.dumps(plan.to_dict()))["memory"]["saved_activation_bytes"], str)


@pytest.mark.thinned(6)
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


def test_inference_has_a_forward_only() -> None:
    with torch.no_grad():
        plan = plan_of(2)
    assert {row.phase for row in plan.collectives} <= {"inference"}
    assert plan.memory.saved_activation_bytes == plan.memory.gradient_bytes == 0
    assert "return" in plan.graph("forward")


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


@pytest.mark.thinned(3)
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


@pytest.mark.thinned(3)
def test_the_page_is_one_file_that_escapes_everything(tmp_path: Path) -> None:
    plan = plan_of(2)
    plan.model = "</script><b>&"
    plan.graphs["capture"] += "# </script><script>alert(1)</script>"
    file = tmp_path / "plan.html"
    plan.save(str(file))
    text = file.read_text()

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}

    tags = Tags()
    tags.feed(text)
    assert tags.found.count("script") == 2
    assert "b" not in tags.found
    assert "http" not in re.sub(r"<script type=.*?</script>", "", text, flags=re.DOTALL)
    data = re.search(r'id="graphs">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    graphs = {row["name"]: row for row in json.loads(data[1])}
    assert list(graphs) == list(plan.graphs)
    assert graphs["backward"]["text"] == plan.graph("backward")
    assert "+" in graphs["parallelize-attention"]["diff"]


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
        return y.roll(1, 2)
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


def test_import_is_cheap() -> None:
    code = "import sys, spcompile; spcompile.explain, spcompile.verify; print([m for m in sys.modules if 'torch' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.thinned(3)
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


@pytest.mark.thinned(3)
def test_weight_memory_of_drop_in_tp_is_remarked() -> None:
    with torch.device("meta"):
        model = Model(layers=1)
    plan = explain(model, {"ids_BS": torch.zeros(1, 64, dtype=torch.int64, device="meta")}, mesh={"tp": 2})
    (remark,) = [r for r in plan.remarks if r.code == "SPR505"]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    held = int(remark.text.rsplit(" ", 1)[1].replace(",", ""))
    assert f"{whole:,}" in remark.text
    assert whole / 2 < held < 0.75 * whole
    assert not [r for r in plan_of(2, layers=1).remarks if r.code == "SPR505"]
