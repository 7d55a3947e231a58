"""lower-collectives: text, meaning (simulated, both ways of being in flight), idempotence, symbolic sizes, binding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.fx as fx
from functorch.compile import aot_function, make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.check.simulate import Simulator
from spcompile.check.verifier import verify_graph
from spcompile.collectives import COLLECTIVES
from spcompile.diagnostics import InvalidGraph, Remarks
from spcompile.graph.axes import bind_axes
from spcompile.graph.printer import format_graph
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.schedule.lower_collectives import LowerCollectives
from spcompile.passes_api import Context, Stage

spx = torch.ops.spx
MESH = MeshShape.of({"cp": 2})
CONTEXT = Context(MESH, Options(), Remarks())
LINE = '  File "/home/somebody/model.py", line 7, in forward\n    y = x * w\n'


def program(order: str) -> Callable[..., Any]:
    """Every collective once; x [2, length, 3] and w [3, 3] are whole."""

    def local(x: torch.Tensor, w: torch.Tensor) -> Any:
        length = x.shape[1]
        part = spx.shard(x, 1, "cp", 2, order, 0.0) @ spx.vary(w, "cp", 2)
        part = spx.reorder(part, 1, length, "cp", 2, order, "contiguous")
        whole = spx.all_gather(part.sin(), 1, length, "cp", 2, "contiguous", "R")
        scale = spx.all_reduce(part.cos().sum(), "cp", 2, "R")
        part = spx.reduce_scatter(whole * part.mean() * scale, 1, "cp", 2, order)
        part = part + spx.all_to_all(part.expand(2, *part.shape), "cp", 2)[0]
        masked = spx.mask_padding(part, 1, length, "cp", 2, order, 0.0)
        return spx.all_reduce(masked.sum(), "cp", 2, "I"), spx.all_gather(masked, 1, length, "cp", 2, order, "I")

    return local


def traced(function: Callable[..., Any], *inputs: torch.Tensor, mode: str = "fake") -> fx.GraphModule:
    gm = make_fx(function, tracing_mode=mode)(*inputs)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta.update(stack_trace=LINE, nn_module_stack={"a": ("a", object)}, seq_nr=3)
    return gm


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("in_flight", ["poison", "late"])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("length", [8, 5])
def test_meaning(order: str, mode: str, in_flight: Any, length: int) -> None:
    x, w = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    gm = traced(program(order), x, w, mode=mode)
    verify_graph(gm, Stage.LOCAL, MESH, trainable=["x_1", "w_1"])
    inputs = [[x, w], [x, w]]
    expected = Simulator(MESH).run(gm, inputs)
    there = {node.target for node in gm.graph.nodes} & set(COLLECTIVES)
    assert LowerCollectives().run(gm, CONTEXT) == 7
    verify_graph(gm, Stage.SCHEDULE, MESH)
    remaining = {node.target for node in gm.graph.nodes} & set(COLLECTIVES)
    assert remaining == {op for op in there if COLLECTIVES[op].lowered is None}
    assert_same(Simulator(MESH, in_flight).run(gm, inputs), expected)
    before = format_graph(gm)
    assert LowerCollectives().run(gm, CONTEXT) == 0
    assert format_graph(gm) == before


@pytest.mark.thinned(24)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("order", "length"), [("contiguous", 5), ("zigzag", 8), ("zigzag", 7)])
def test_forward_and_backward_graphs_of_aot_autograd(order: str, length: int, dynamic: bool) -> None:
    """Loss and gradients of the lowered graphs are those of the simulated program."""
    x, w = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    leaves = [[t.clone().requires_grad_() for t in (x, w)] for _ in range(2)]
    results = Simulator(MESH).run(traced(program(order), x, w), leaves)
    torch.autograd.backward([loss for loss, _ in results])
    expected = [[loss.detach(), y.detach()] for loss, y in results]

    graphs: list[fx.GraphModule] = []

    def lower(gm: fx.GraphModule, inputs: Any) -> Any:
        """Stands for the compiler: there are no processes on which the graph could run."""
        LowerCollectives().run(gm, CONTEXT)
        graphs.append(gm)
        values = [n.meta["val"] if isinstance(n, fx.Node) else n for n in gm.graph.output_node().args[0]]
        return make_boxed_func(lambda *args: [example(val) for val in values])

    stand_in = [t.clone().requires_grad_() for t in (x, w)]
    aot_function(program(order), fw_compiler=lower, bw_compiler=lower, dynamic=dynamic)(*stand_in)[0].backward()
    forward, backward = graphs
    inputs: list[list[Any]] = [[x, w], [x, w]]
    sizes = [n for n in forward.graph.find_nodes(op="placeholder") if not isinstance(n.meta["val"], torch.Tensor)]
    if sizes:
        inputs = [[*(n.meta["val"].node.hint for n in sizes), x, w] for _ in range(2)]
        order_of = [isinstance(n.meta["val"], torch.Tensor) for n in forward.graph.find_nodes(op="placeholder")]
        assert order_of == sorted(order_of)
    with torch.no_grad():
        outputs = Simulator(MESH).run(forward, inputs)
        assert_same([row[:2] for row in outputs], expected)
        tangents = [torch.ones((), dtype=torch.float64), torch.zeros(2, length, 3, dtype=torch.float64)]
        grads = Simulator(MESH).run(backward, [[*saved_in_order(row), *tangents] for row in outputs])
    found = [[g for g in row if isinstance(g, torch.Tensor)] for row in grads]
    assert_same(found, [[leaf.grad for leaf in row] for row in leaves])


def example(val: Any) -> Any:
    """A value as the graph promises it, for sizes at hand."""
    if isinstance(val, torch.Tensor):
        return torch.zeros([example(size) for size in val.shape], dtype=val.dtype)
    return val.node.hint if isinstance(val, torch.SymInt) else val


def saved_in_order(row: Any) -> list[Any]:
    """What the backward graph takes from a rank's forward outputs: after the program's two results, sizes first."""
    return sorted(row[2:], key=lambda value: isinstance(value, torch.Tensor))


class TestText(expecttest.TestCase):
    def lowered(self, function: Callable[..., Any], *inputs: torch.Tensor) -> str:
        gm = traced(function, *inputs)
        LowerCollectives().run(gm, CONTEXT)
        return format_graph(gm)

    def test_all_gather(self) -> None:
        text = self.lowered(lambda x: spx.all_gather(x, 0, 5, "cp", 2, "contiguous", "R"), torch.randn(3))
        self.assertExpectedInline(
            text,
            """\
x_1: "f32[3]" = input
# model.py:7  y = x * w
all_gather_into_tensor: "f32[6]" = _c10d_functional.all_gather_into_tensor(x_1, 2, 'cp')
wait_tensor: "f32[6]" = _c10d_functional.wait_tensor(all_gather_into_tensor)
view: "f32[2, 3]" = aten.view(wait_tensor, [2, 3])
permute: "f32[2, 3]" = aten.permute(view, [0, 1])
view_1: "f32[6]" = aten.view(permute, [6])
all_gather: "f32[5]" = aten.slice(view_1, 0, 0, 5)
return all_gather
""",
        )

    def test_reduce_scatter(self) -> None:
        text = self.lowered(lambda x: spx.reduce_scatter(x, 0, "cp", 2, "contiguous"), torch.randn(5))
        self.assertExpectedInline(
            text,
            """\
x_1: "f32[5]" = input
# model.py:7  y = x * w
full: "f32[1]" = aten.full([1], 0, dtype=f32, layout=torch.strided, device=cpu, pin_memory=False)
cat: "f32[6]" = aten.cat([x_1, full])
view: "f32[2, 3]" = aten.view(cat, [2, 3])
permute: "f32[2, 3]" = aten.permute(view, [0, 1])
reduce_scatter_tensor: "f32[1, 3]" = _c10d_functional.reduce_scatter_tensor(permute, 'sum', 2, 'cp')
wait_tensor: "f32[1, 3]" = _c10d_functional.wait_tensor(reduce_scatter_tensor)
reduce_scatter: "f32[3]" = aten.view(wait_tensor, [3])
return reduce_scatter
""",
        )

    def test_identity_and_all_reduce(self) -> None:
        text = self.lowered(lambda x: spx.all_reduce(spx.vary(x, "cp", 2) * 2, "cp", 2, "R"), torch.randn(5))
        self.assertExpectedInline(
            text,
            """\
x_1: "f32[5]" = input
# model.py:7  y = x * w
mul: "f32[5]" = aten.mul(x_1, 2)
all_reduce_1: "f32[5]" = _c10d_functional.all_reduce(mul, 'sum', 'cp')
all_reduce: "f32[5]" = _c10d_functional.wait_tensor(all_reduce_1)
return all_reduce
""",
        )


def test_origin_is_kept_and_not_shared() -> None:
    gm = traced(lambda x: spx.all_gather(x, 0, 5, "cp", 2, "contiguous", "R"), torch.randn(3))
    for node in gm.graph.nodes:
        node.meta["sharding"] = {"cp": "R"}
    LowerCollectives().run(gm, CONTEXT)
    *_, last = made = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert len(made) >= 2
    for node in made:
        assert node.meta["stack_trace"] == LINE
        assert node.meta["seq_nr"] == 3
        assert node.meta["spx_origin"] == "lower-collectives"
    made[0].meta["nn_module_stack"]["b"] = ("b", object)
    assert "b" not in made[1].meta["nn_module_stack"]
    assert [("sharding" in node.meta) for node in made] == [node is last for node in made]


def test_axes_stay_until_they_are_bound() -> None:
    """The text, whose hash ranks compare, is the same before and after, and for any group name."""
    gm = traced(program("zigzag"), torch.randn(2, 8, 3), torch.randn(3, 3))
    LowerCollectives().run(gm, CONTEXT)
    before = format_graph(gm)
    assert bind_axes(gm.graph, {"cp": "17", "tp": "18"}) == 9
    assert bind_axes(gm.graph, {"cp": "17", "tp": "18"}) == 0
    gm.recompile()
    assert "'17'" in gm.code
    assert "'cp'" not in gm.code
    assert format_graph(gm) == before
    x, w = torch.randn(2, 8, 3), torch.randn(3, 3)
    assert len(Simulator(MESH).run(gm, [[x, w], [x, w]])) == 2


def test_an_axis_given_by_keyword_is_bound() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(spx.shard.default, (x, 0), {"axis": "cp", "degree": 2, "order": "zigzag", "fill": 0.0})
    graph.output(node)
    assert bind_axes(graph, {"cp": "17"}) == 1
    assert node.kwargs["axis"] == "17"
    assert "axis='cp'" in format_graph(fx.GraphModule(torch.nn.Module(), graph))


def test_an_axis_without_group_is_an_error() -> None:
    gm = traced(lambda x: spx.all_reduce(x, "cp", 2, "R"), torch.randn(2))
    with pytest.raises(InvalidGraph, match=r"all_reduce runs on axis 'cp'[\s\S]*legal: axes tp"):
        bind_axes(gm.graph, {"tp": "1"})
