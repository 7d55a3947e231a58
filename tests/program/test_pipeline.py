"""The pipeline: options of passes, their order, verification after each, snapshots."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from example_numerics import captured
from torch import Tensor

from spcompile.diagnostics import IllegalOption, InvalidGraph, Remarks
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes_api import AxisPass, Context, Pass, PassReport, Stage
from spcompile.program.build import build
from spcompile.program.pipeline import History, check_order, configure, run_passes
from spcompile.report.example_runs import with_dynamo_graph

MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class First(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "first"
    stage: ClassVar[Stage] = Stage.GLOBAL
    strength: int = 1

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        return 0


@dataclass(frozen=True)
class Second(First):
    """Stands behind First."""

    name: ClassVar[str] = "second"
    after: ClassVar[frozenset[str]] = frozenset({"first"})


@dataclass(frozen=True)
class Lies(First):
    """Says that a value has another shape than it has."""

    name: ClassVar[str] = "lies"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        node = next(n for n in gm.graph.nodes if n.op == "call_function")
        node.meta["val"] = node.meta["val"].new_empty(99)
        return 1


@dataclass(frozen=True)
class DoublesInSilence(First):
    """Says that it did nothing."""

    name: ClassVar[str] = "doubles-in-silence"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        node = next(n for n in gm.graph.nodes if n.op == "call_function")
        node.args = (node.args[0], 2 * node.args[1])
        return 0


def context() -> Context:
    return Context(MeshShape.of({"cp": 2}), Options(), Remarks())


def test_a_pass_can_be_switched_off() -> None:
    assert [p.name for p in configure([First(), Second()], {"first": False})] == ["second"]


def test_a_pass_can_be_given_options() -> None:
    first, second = configure([First(), Second()], {"first": {"strength": 5}})
    assert (first, second) == (First(5), Second())


def test_unknown_passes_and_fields() -> None:
    with pytest.raises(IllegalOption, match=r"(?s)no pass 'third'.*legal: first, second"):
        configure([First(), Second()], {"third": False})
    with pytest.raises(IllegalOption, match=r"(?s)first has no option 'power'.*legal: strength"):
        configure([First()], {"first": {"power": 1}})


def test_the_order_is_checked() -> None:
    check_order([First(), Second()])
    check_order([Second()])  # what is not there need not stand in front
    with pytest.raises(AssertionError, match="second must run after first"):
        check_order([Second(), First()])


def test_the_pipeline_is_in_order_and_its_names_are_its_files() -> None:
    check_order(PIPELINE)
    for p in PIPELINE:
        file = type(p).__module__.rpartition(".")[2]
        words = re.findall("[A-Z][a-z]+", type(p).__name__)
        name = "_".join(words).lower() if isinstance(p, AxisPass) else p.name.replace("-", "_")
        assert name.startswith(file) if isinstance(p, AxisPass) else name == file
        assert p.summary
        assert not p.summary.endswith(".")


def test_stages_follow_each_other() -> None:
    stages = [p.stage for p in PIPELINE]
    assert stages == sorted(stages, key=list(Stage).index)


def test_a_broken_graph_names_the_pass() -> None:
    gm = captured(lambda h: h * 2, torch.randn(3))
    with pytest.raises(InvalidGraph, match=r"SP901 invalid graph: after pass lies: mul: .*f32\[3\].*f32\[99\]"):
        run_passes(gm, [First(), Lies()], context(), History())


def attend(h: Tensor) -> Tensor:
    h = h.unsqueeze(1)
    return F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)


def test_history_has_the_text_after_every_pass() -> None:
    history, options = History(keep_texts=True), Options(attention="ring")
    with_dynamo_graph(
        attend, [torch.randn(2, 8, 4)], lambda gm, x: build(gm, x, MeshShape.of({"cp": 2}), options, PIPELINE, history)
    )
    ran = [p for p in PIPELINE if p.stage is not Stage.SCHEDULE and p.axis in (None, "cp")]
    names = ["capture", *(p.name for p in ran)]
    assert [s.name for s in history.snapshots] == names
    assert "spx.ring_attention" in history.text("parallelize-attention")
    assert history.snapshots[2].report.ops["spx.attention"] == (0, 1)
    with pytest.raises(KeyError, match="no graph 'nothing'; there are: capture, recognize-softmax"):
        history.text("nothing")


def test_a_graph_that_no_pass_changed_is_kept_once() -> None:
    gm = captured(lambda h: h * 2, torch.randn(3))
    history = History(keep_graphs=True)
    run_passes(gm, [First(), Second()], context(), history)
    silent = DoublesInSilence()
    history.add(silent.name, silent.stage, gm, context(), PassReport(silent.run(gm, context())))
    kept = [s.gm for s in history.snapshots]
    assert kept[0] is kept[1]
    assert [next(iter(k.graph.find_nodes(op="call_function", target=MUL))).args[1] for k in kept if k] == [2, 2, 4]
