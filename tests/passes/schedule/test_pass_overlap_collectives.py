"""overlap-collectives: whole models in the simulator, races that it must catch, and what stands where."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.fx as fx
from example_numerics import after_autograd, assert_equal, on_one_device
from final_graphs import MODES, Graphs, Mode, final_graphs, llama, tokens
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile.check.attention_specs  # noqa: F401  (the simulator learns ring attention)
from spcompile.check.simulate import Simulator
from spcompile.check.verifier import verify_graph
from spcompile.diagnostics import Remarks
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.schedule.overlap_collectives import OverlapCollectives
from spcompile.passes_api import Context, Stage
from spcompile.schedule.op_cost import CostModel, cost_model
from spcompile.schedule.timeline import is_wait, starts, timeline
from spcompile.sharding.global_view import Part, global_view

c10d = torch.ops._c10d_functional
aten = torch.ops.aten

CASES = {
    "tp": ({"tp": 2}, {}),
    "ulysses": ({"cp": 2}, {"attention": "ulysses"}),
    "ring": ({"cp": 2}, {"attention": "ring"}),
    "tp x cp": ({"tp": 2, "cp": 2}, {}),
}


@pytest.mark.thinned(28)
@pytest.mark.parametrize("case", CASES)
def test_whole_models_in_both_modes_of_the_simulator(case: str) -> None:
    """A start reads its operand at once or at its wait, its buffer is NaN until then: loss and gradients stay."""
    mesh, options = CASES[case]
    graphs, plain, inputs = final_graphs(llama(), tokens(), mesh, **options)
    expected = on_one_device(plain, inputs)
    for mode in MODES:
        for rank in after_autograd(graphs["forward"], graphs["backward"], inputs, mesh, mode):
            assert_equal(rank, expected)


def plant(graphs: Graphs, kind: str) -> None:
    """A race in the backward: a reader in front of the wait, or an operand that is overwritten in flight."""
    graph = graphs["backward"].graph
    wait = next(n for n in graph.nodes if is_wait(n) and "reduce_scatter" in str(n.args[0].target))
    start = wait.args[0]
    with graph.inserting_before(wait):
        if kind == "late":
            graph.call_function(aten.mul_.Tensor, (start.args[0], 2.0))
        else:
            copy = graph.call_function(aten.clone.default, (start,))
            wait.replace_all_uses_with(copy)
    graphs["backward"].recompile()


@pytest.mark.thinned(10)
@pytest.mark.parametrize("mode", MODES)
def test_a_planted_race_is_caught(mode: Mode) -> None:
    mesh, options = CASES["tp"]
    graphs, plain, inputs = final_graphs(llama(1), tokens(), mesh, **options)
    plant(graphs, mode)
    expected = on_one_device(plain, inputs)
    rank = after_autograd(graphs["forward"], graphs["backward"], inputs, mesh, mode)[0]
    with pytest.raises(AssertionError):
        assert_equal(rank, expected)


def events(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def seconds_between(gm: fx.GraphModule, cost: CostModel) -> list[tuple[fx.Node, float]]:
    """Every collective with the compute between its start and its wait."""
    flying: dict[fx.Node, float] = {}
    found = []
    now = 0.0
    for node in gm.graph.nodes:
        if starts(node):
            flying[node] = now
        elif is_wait(node):
            found.append((node.args[0], now - flying[node.args[0]]))
        else:
            now += cost.work(node).seconds
    return found


@pytest.mark.thinned(4)
def test_products_for_weights_hide_the_scatters_of_the_backward() -> None:
    mesh = MeshShape.of({"tp": 2})
    graphs, _, _ = final_graphs(llama(), tokens(), {"tp": 2})
    cost = cost_model(mesh, Options(compiler="eager"))
    scatters = [s for n, s in seconds_between(graphs["backward"], cost) if "reduce_scatter" in str(n.target)]
    assert len(scatters) == 2 * 2 + 1
    assert min(scatters[1:]) > 0  # the first one follows the loss, whose products are in one op
    for node in events(graphs["backward"]):
        if is_wait(node) and "reduce_scatter" in str(node.args[0].target):
            assert node.next in node.users, "as late as its readers allow"


class Sharded(nn.Module):
    """Layers of two products; of each weight every rank of cp holds a part (ZeRO-3)."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        for i in range(2 * layers):
            self.register_parameter(f"part{i}", nn.Parameter(torch.randn(width // 2, width) / width))
        self.count = 2 * layers

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BNSD = x_BSD[:, None]
        x_BSD = torch.nn.functional.scaled_dot_product_attention(x_BNSD, x_BNSD, x_BNSD)[:, 0]
        for i in range(self.count):
            weight = global_view(getattr(self, f"part{i}"), (Part(0, "cp", 2),))
            x_BSD = x_BSD + torch.tanh(x_BSD @ weight)
        return x_BSD.square().mean()


def gathers_of(graphs: Graphs, phase: str) -> list[tuple[fx.Node, float]]:
    cost = cost_model(MeshShape.of({"cp": 2}), Options(compiler="eager"))
    return [(n, s) for n, s in seconds_between(graphs[phase], cost) if "all_gather" in str(n.target)]


@pytest.mark.thinned(6)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_parameters_are_gathered_ahead_of_their_use_but_not_at_the_top(phase: str) -> None:
    layers, width = 6, 512
    off = {"bucket-collectives": False}
    graphs, _, _ = final_graphs(Sharded(layers, width), (torch.randn(1, 8192, width),), {"cp": 2}, passes=off)
    cost = cost_model(MeshShape.of({"cp": 2}), Options(compiler="eager"))
    found = gathers_of(graphs, phase)
    a_layer = sum(cost.work(n).seconds for n in graphs[phase].graph.nodes) / layers
    assert len(found) >= 2 * layers - 1
    for gather, seconds in found[2:]:
        assert cost.communication(gather) < seconds < 2 * a_layer, gather
    waited = timeline("", graphs[phase].graph.nodes, cost)
    assert waited.exposed < 0.2 * waited.communication  # nothing precedes the first gather or follows the last scatter


@pytest.mark.thinned(2)
def test_the_budget_of_memory_is_held() -> None:
    """None to spare: every gather starts right before its reader, whatever that costs."""
    off = {"bucket-collectives": False, "overlap-collectives": {"memory_mib": 0.0}}
    graphs, _, _ = final_graphs(Sharded(3, 64), (torch.randn(1, 256, 64),), {"cp": 2}, passes=off)
    assert [seconds for _, seconds in gathers_of(graphs, "forward")] == [0.0] * 6


def run_on(function: Any, *inputs: Tensor, mesh: Mapping[str, int], memory_mib: float = 1024.0) -> fx.GraphModule:
    """The pass on what a function over one rank's tensors traces to."""
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    for node in events(gm):
        node.meta["spx_origin"] = "test"
    shape = MeshShape.of(mesh)
    OverlapCollectives(memory_mib).run(gm, Context(shape, Options(), Remarks()))
    verify_graph(gm, Stage.SCHEDULE, shape)
    return gm


def test_writes_and_random_numbers_stay_in_order() -> None:
    """A sum waits for nothing, but what is drawn and what is written to inputs keeps its place among its kind."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        first = torch.rand_like(x)
        total = c10d.wait_tensor(c10d.all_reduce(x @ x, "sum", "cp"))
        before = y + 1
        aten.copy_.default(y, total)
        after = y * 2
        second = torch.rand_like(x)
        return first @ x, before @ second, after

    x, y = torch.randn(4, 4), torch.randn(4, 4)
    gm = run_on(function, x, y, mesh={"cp": 2})
    inputs = [[x, y.clone()], [x + 1, y.clone()]]
    torch.manual_seed(0)
    found = Simulator(MeshShape.of({"cp": 2})).run(gm, inputs)
    plain = make_fx(function, tracing_mode="fake")(x, y)
    torch.manual_seed(0)
    again = [[x, y.clone()], [x + 1, y.clone()]]
    expected = Simulator(MeshShape.of({"cp": 2})).run(plain, again)
    for ours, theirs in zip([*found, *inputs], [*expected, *again], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("memory_mib", "early"), [(1024.0, True), (0.0, False)], ids=["room", "none"])
def test_what_a_later_collective_needs_runs_early_only_where_there_is_room(memory_mib: float, early: bool) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        first = c10d.wait_tensor(c10d.all_reduce(x @ x, "sum", "cp"))
        second = c10d.wait_tensor(c10d.all_reduce(first @ first, "sum", "cp"))
        made_again = torch.addmm(y, y, y)
        third = c10d.wait_tensor(c10d.all_reduce(second @ made_again, "sum", "cp"))
        return third @ third

    x = torch.randn(64, 64)
    names = [str(n.target) for n in events(run_on(function, x, x, mesh={"cp": 2}, memory_mib=memory_mib))]
    place = names.index("aten.addmm.default")
    assert names[:place].count("_c10d_functional.all_reduce.default") == (1 if early else 2)
    assert len(names) == 11


def test_gradients_are_waited_for_at_the_end() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = c10d.wait_tensor(c10d.all_reduce(x @ x, "sum", "cp"))
        second = x @ (x @ x.sin())
        return first, second

    gm = run_on(function, torch.randn(64, 64), mesh={"cp": 2})
    names = [str(n.target).split(".")[1] for n in events(gm) if n.target is not aten.sin.default]
    assert names == ["mm", "all_reduce", "mm", "mm", "wait_tensor"]


@pytest.mark.thinned(6)
@pytest.mark.slow
def test_work_grows_with_the_layers() -> None:
    """Calls of Python functions in the pass: no more for each layer of five than for each of two."""

    def calls(layers: int) -> int:
        with torch.device("meta"):
            model, ids_BS = llama(layers).to(torch.float32), torch.zeros(1, 16, dtype=torch.int64)
        graphs, _, _ = final_graphs(model, (ids_BS, ids_BS), {"tp": 2}, passes={"overlap-collectives": False})
        count = 0

        def seen(*_: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(seen)
        try:
            OverlapCollectives().run(graphs["backward"], Context(MeshShape.of({"tp": 2}), Options(), Remarks()))
        finally:
            sys.setprofile(None)
        return count

    one, two, five = calls(1), calls(2), calls(5)
    assert five - two < 1.1 * 3 * (two - one)
