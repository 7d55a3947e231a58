"""Inductor keeps the order that overlap-collectives found: read off the code that it writes, which is not compiled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.fx as fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering

from spcompile import models
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program import emit
from spcompile.program.build import build
from spcompile.program.trace import through_dynamo
from spcompile.schedule.op_cost import cost_model
from spcompile.schedule.timeline import is_wait, starts


@dataclass(frozen=True)
class Flight:
    """One collective: how many products and attentions stand before its start, and before its wait."""

    op: str
    before_start: int
    before_wait: int


def in_graph(gm: fx.GraphModule, mesh: MeshShape) -> list[Flight]:
    cost = cost_model(mesh, Options())
    heavy = 0
    flying: dict[fx.Node, tuple[str, int]] = {}
    found: dict[fx.Node, Flight] = {}
    for node in gm.graph.nodes:
        if starts(node):
            flying[node] = (str(node.target._opname), heavy)
        elif is_wait(node):
            found[node.args[0]] = Flight(*flying[node.args[0]], heavy)
        elif node.op == "call_function" and cost.is_heavy(node):
            heavy += 1
    return [found[start] for start in flying]


def in_code(code: str) -> list[Flight]:
    heavy = 0
    flying: dict[str, tuple[str, int]] = {}
    order: list[str] = []
    found: dict[str, Flight] = {}
    for line in code.split("def call")[1].splitlines():
        if (wait := re.search(r"^\s*torch\.ops\._c10d_functional\.wait_tensor\.default\((\w+)\)", line)) is not None:
            found[wait[1]] = Flight(*flying[wait[1]], heavy)
        elif (start := re.search(r"^\s*(\w+) = torch\.ops\._c10d_functional\.(\w+)\.default\(", line)) is not None:
            flying[start[1]] = (start[2], heavy)
            order.append(start[1])
        elif (inplace := re.search(r"^\s*torch\.ops\._c10d_functional\.(\w+)_\.default\((\w+)", line)) is not None:
            flying[inplace[2]] = (inplace[1], heavy)
            order.append(inplace[2])
        elif re.search(r"extern_kernels\.\w*mm\(|= torch\.ops\.spx\.\w*attention\w*\.default\(", line):
            heavy += 1
    return [found[name] for name in order]


def written(mesh: dict[str, int], **options: Any) -> list[tuple[fx.GraphModule, str]]:
    """The final graphs of a Llama and the code for each."""
    codes: list[str] = []
    emissions: list[emit.Emission] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        chosen = Options(outputs="loss", attention="ulysses", **options)
        program = build(gm, inputs, MeshShape.of(mesh), chosen, PIPELINE)
        emissions.append(emit.Emission(program, bind=lambda graph: None))
        with (
            torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            torch._inductor.config.patch(force_disable_caches=True),
            mock.patch.object(GraphLowering, "save_output_code", codes.append),
            mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=None),
            mock.patch("torch._dynamo.repro.after_aot.save_graph_repro"),  # it looks for process groups
        ):
            emit.emit(emissions[0], "inductor")

    model = models.build("llama-tiny", layers=1)
    ids_BS = torch.zeros(1, 32, dtype=torch.int64)
    through_dynamo(model, {"ids_BS": ids_BS, "labels_BS": ids_BS}, backend)
    return list(zip(emissions[0].graphs.values(), codes, strict=True))


def undone(gm: fx.GraphModule, code: str, mesh: dict[str, int]) -> list[tuple[Flight, Flight]]:
    """The collectives that the code starts later or waits for earlier than the graph."""
    wanted, kept = in_graph(gm, MeshShape.of(mesh)), in_code(code)
    assert [flight.op for flight in wanted] == [flight.op for flight in kept]
    pairs = zip(wanted, kept, strict=True)
    return [(w, k) for w, k in pairs if k.before_start > w.before_start or k.before_wait < w.before_wait]


GROUPS = {"split-all-to-alls": {"groups": 2, "way": "first apart"}}


def check(pairs: list[tuple[fx.GraphModule, str]], mesh: dict[str, int]) -> None:
    """The code keeps the order of the graphs, in which several collectives are hidden."""
    hidden = [f for gm, _ in pairs for f in in_graph(gm, MeshShape.of(mesh)) if f.before_wait > f.before_start]
    assert len(hidden) >= 3
    for gm, code in pairs:
        assert not undone(gm, code, mesh)


@pytest.mark.slow
@pytest.mark.thinned(4)
@pytest.mark.parametrize("passes", [GROUPS, {}], ids=["groups of heads", "all heads"])
def test_the_order_is_that_of_the_graph(passes: dict[str, Any]) -> None:
    check(written({"cp": 2}, passes=passes), {"cp": 2})


@pytest.mark.thinned(4)
@pytest.mark.slow
def test_without_its_settings_inductor_sorts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file reads off the code does tell the difference."""
    monkeypatch.setattr(emit, "KEEP_THE_ORDER", {})
    assert any(undone(gm, code, {"tp": 2}) for gm, code in written({"tp": 2}))


@pytest.mark.thinned(4)
@pytest.mark.slow
def test_the_order_of_tp_stays_and_passes_of_the_users_own_run_too() -> None:
    seen: list[str] = []
    names = ("joint_custom_pre_pass", "post_grad_custom_post_pass")
    own = {name: lambda graph, name=name: seen.append(name) for name in names}
    with torch._inductor.config.patch(own):
        pairs = written({"tp": 2})
    assert sorted(seen) == [names[0], names[1], names[1]]  # once; forward and backward
    check(pairs, {"tp": 2})
