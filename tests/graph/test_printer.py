"""The canonical text of graphs."""

from __future__ import annotations

import operator
from typing import Any

import expecttest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile.collectives  # noqa: F401
from spcompile.diagnostics import Remarks
from spcompile.graph.axes import bind_axes
from spcompile.graph.printer import format_graph, op_name, type_text, unified_diff
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes.schedule.lower_collectives import LowerCollectives
from spcompile.passes_api import Context

spx = torch.ops.spx


def trace(text: str, line: int) -> str:
    return f'  File "/home/somebody/model.py", line {line}, in forward\n    {text}\n'


def example() -> fx.GraphModule:
    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = spx.shard(x, 1, "cp", 2, "zigzag", 0.0)
        values, indices = torch.ops.aten.topk(y.to(torch.bfloat16), 2)
        z = torch.ops.aten.full([2], 1.5, dtype=torch.float64, device=torch.device("cpu"))
        return values, indices[:, ::2], torch.cat([z, w]), None

    gm = make_fx(function, tracing_mode="fake")(torch.randn(2, 5, 3), torch.randn(4))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["stack_trace"] = trace("return x", 4)
            if op_name(node) == "spx.shard":
                node.meta["stack_trace"] = trace("x = take(x)", 3)
                node.meta["sharding"] = {"tp": "R", "cp": "S(1)"}
    return gm


class TestText(expecttest.TestCase):
    def test_graph(self) -> None:
        self.assertExpectedInline(
            format_graph(example(), MeshShape.of({"tp": 1, "cp": 2}), "stage local, after lower"),
            """\
# stage local, after lower
# mesh tp=1 cp=2
x_1: "f32[2, 5, 3]" = input
w_1: "f32[4]" = input
# model.py:3  x = take(x)
shard: "f32[2, 4, 3] tp=R cp=S(1)" = spx.shard(x_1, 1, 'cp', 2, 'zigzag', 0.0)
# model.py:4  return x
_to_copy: "bf16[2, 4, 3]" = aten._to_copy(shard, dtype=bf16)
topk: "(bf16[2, 4, 2], i64[2, 4, 2])" = aten.topk(_to_copy, 2)
getitem: "bf16[2, 4, 2]" = topk[0]
getitem_1: "i64[2, 4, 2]" = topk[1]
full: "f64[2]" = aten.full([2], 1.5, dtype=f64, device=cpu)
slice_1: "i64[2, 2, 2]" = aten.slice(getitem_1, 1, 0, 9223372036854775807, 2)
cat: "f64[6]" = aten.cat([full, w_1])
return (getitem, slice_1, cat, None)
""",
        )

    def test_symbolic_sizes(self) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            return spx.reduce_scatter(x, 0, "cp", 2, "contiguous") * x.shape[0]

        gm = make_fx(function, tracing_mode="symbolic")(torch.randn(6, 5))
        self.assertExpectedInline(
            format_graph(gm),
            """\
x_1: "f32[s75, s96]" = input
reduce_scatter: "f32[((s75 + 1)//2), s96]" = spx.reduce_scatter(x_1, 0, 'cp', 2, 'contiguous')
sym_size_int: "SymInt(s75)" = aten.sym_size(x_1, 0)
mul: "f32[((s75 + 1)//2), s96]" = aten.mul(reduce_scatter, sym_size_int)
return mul
""",
        )

    def test_calls_that_are_no_aten_ops(self) -> None:
        graph = fx.Graph()
        x = graph.placeholder("x")
        pair = graph.call_method("split", (x, 2))
        first = graph.call_function(operator.getitem, (pair, 0))
        rows = graph.call_function(operator.getitem, (first, (slice(None, 2), None, Ellipsis)))
        weight = graph.get_attr("weight")
        graph.output({"y": graph.call_module("norm", (rows, weight)), "d": torch.device("cpu")})
        module = torch.nn.Module()
        module.norm, module.weight = torch.nn.Identity(), torch.nn.Parameter(torch.ones(1))
        self.assertExpectedInline(
            format_graph(fx.GraphModule(module, graph)),
            """\
x: "?" = input
split: "?" = x.split(2)
getitem: "?" = split[0]
getitem_1: "?" = getitem[(:2, None, ...)]
weight: "f32[1]" = self.weight
norm: "?" = self.norm(getitem_1, weight)
return {'y': norm, 'd': cpu}
""",
        )

    def test_diff(self) -> None:
        self.assertExpectedInline(
            unified_diff("a\nb\n", "a\nc\n"),
            """\
--- before
+++ after
@@ -1,2 +1,2 @@
 a
-b
+c
""",
        )


def test_equal_graphs_have_equal_texts_and_no_diff() -> None:
    first, second = format_graph(example()), format_graph(example())
    assert first == second
    assert unified_diff(first, second) == ""


def test_nothing_of_one_rank_is_in_the_text() -> None:
    """Process groups have other names on other ranks, and tensors live on other devices."""

    def lowered(group: str, device: int) -> str:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = FakeTensorMode().from_tensor(torch.ones(2))
        y = graph.call_function(spx.all_reduce.default, (x, "cp", 2, "I"))
        y.meta["val"] = x.meta["val"]
        where = {"device": torch.device("cuda", device)}
        z = graph.call_function(torch.ops.aten.zeros.default, ([2],), where)
        s = graph.call_function(spx.shard.default, (z, 0, "cp", 2, "zigzag", 0.0))
        graph.output((y, s))
        gm = fx.GraphModule(torch.nn.Module(), graph)
        LowerCollectives().run(gm, Context(MeshShape.of({"cp": 2}), Options(), Remarks()))
        bind_axes(gm.graph, {"cp": group})
        assert any(group in node.args for node in gm.graph.nodes)
        return format_graph(gm)

    assert lowered("11", 0) == lowered("12", 1)
    assert "'11'" not in lowered("11", 0)
    assert "'cp'" in lowered("11", 0)


def test_types() -> None:
    assert type_text(torch.empty(2, 0, dtype=torch.bool)) == "b8[2, 0]"
    assert type_text((torch.empty(()), [torch.empty(1, dtype=torch.int32)], 3)) == "(f32[], (i32[1]), int)"
    assert type_text(torch.empty(1, dtype=torch.float8_e4m3fn)) == "float8_e4m3fn[1]"
    assert type_text(None) == "?"
