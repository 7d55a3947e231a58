"""The verifier accepts right graphs and names what is wrong in others, with the user's line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import spcompile.collectives  # noqa: F401
from spcompile.check.verifier import verify_graph
from spcompile.diagnostics import InvalidGraph
from spcompile.machine.mesh import MeshShape
from spcompile.passes_api import Stage

spx = torch.ops.spx
aten = torch.ops.aten
c10d = torch.ops._c10d_functional
MESH = MeshShape.of({"tp": 2, "cp": 2})
LINE = '  File "/home/somebody/model.py", line 7, in forward\n    y = x * w\n'
_LIBRARY = torch.library.Library("spx", "FRAGMENT")


def traced(function: Callable[..., Any], *inputs: torch.Tensor, mode: str = "fake") -> fx.GraphModule:
    gm = make_fx(function, tracing_mode=mode)(*inputs)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["stack_trace"] = LINE
    return gm


def verdict(function: Callable[..., Any], *, trainable: Any = ("x_1", "w_1"), **options: Any) -> str:
    """The error's text for a per-rank program of x [4] and w [2]; empty if the graph is valid."""
    gm = traced(function, torch.randn(4), torch.randn(2))
    try:
        verify_graph(gm, Stage.LOCAL, MESH, trainable=trainable, **options)
    except InvalidGraph as error:
        return str(error)
    return ""


def shard(x: torch.Tensor, axis: str = "cp") -> torch.Tensor:
    return spx.shard(x, 0, axis, 2, "contiguous", 0.0)


def total(x: torch.Tensor, to: str = "I", axis: str = "cp", degree: int = 2) -> torch.Tensor:
    return spx.all_reduce(x, axis, degree, to)


class TestStates(expecttest.TestCase):
    def test_missing_vary(self) -> None:
        found = verdict(lambda x, w: total((shard(x) * w).sum()))
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: mul: missing vary: the gradient of w_1 would lack a sum over cp; it is invariant, shard is S
  at /home/somebody/model.py:7 in forward
      y = x * w
  legal: spx.vary(w_1, 'cp', ...), or spx.shard of it""",
        )

    def test_wrong_state_of_the_operand(self) -> None:
        found = verdict(lambda x, w: total(x.sum()))
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: all_reduce: all_reduce is P -> I, but sum_1 is I
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_gathering_what_is_whole(self) -> None:
        found = verdict(lambda x, w: spx.all_gather(spx.vary(w, "cp", 2), 0, 4, "cp", 2, "contiguous", "I"))
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: all_gather: all_gather is S -> I, but vary is R
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_varying_output(self) -> None:
        found = verdict(lambda x, w: shard(x) * 2)
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: mul: varying value reaches an output: S on cp
  at /home/somebody/model.py:7 in forward
      y = x * w
  legal: I""",
        )

    def test_replicate_output(self) -> None:
        found = verdict(lambda x, w: spx.all_gather(shard(x), 0, 4, "cp", 2, "contiguous", "R"))
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: all_gather: replicate value reaches an output: R on cp
  at /home/somebody/model.py:7 in forward
      y = x * w
  legal: I""",
        )

    def test_unknown_axis(self) -> None:
        found = verdict(lambda x, w: total(x, axis="dp"))
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: all_reduce: axis 'dp' is not in the mesh tp=2 cp=2
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_wrong_degree(self) -> None:
        found = verdict(lambda x, w: spx.shard(x, 0, "cp", 4, "contiguous", 0.0))
        self.assertExpectedInline(
            found,
            """\
SP901 invalid graph: shard: degree 4 on axis cp of size 2
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_partial_value_read_as_complete(self) -> None:
        gm = traced(lambda x: torch.exp(shard(x).sum()), torch.randn(4))
        next(n for n in gm.graph.nodes if n.target is aten.sum.default).meta["sharding"] = {"cp": "P", "tp": "I"}
        with pytest.raises(InvalidGraph) as error:
            verify_graph(gm, Stage.LOCAL, MESH, trainable=["x_1"])
        self.assertExpectedInline(
            str(error.value),
            """\
SP901 invalid graph: exp: reads sum_1, which is partial on cp, as if it were complete
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )


class TestAnyStage(expecttest.TestCase):
    def text(self, gm: fx.GraphModule, stage: Stage = Stage.GLOBAL) -> str:
        with pytest.raises(InvalidGraph) as error:
            verify_graph(gm, stage, MESH)
        return str(error.value)

    def graph(self) -> tuple[fx.GraphModule, fx.Node]:
        gm = traced(lambda x, w: x @ w, torch.randn(3, 4), torch.randn(4))
        return gm, next(n for n in gm.graph.nodes if n.target is aten.mv.default)

    def test_wrong_shape(self) -> None:
        gm, node = self.graph()
        node.meta["val"] = node.meta["val"].new_empty(4)
        self.assertExpectedInline(
            self.text(gm),
            """\
SP901 invalid graph: mv: aten.mv.default gives f32[3], the graph says f32[4]
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_wrong_dtype(self) -> None:
        gm, node = self.graph()
        node.meta["val"] = node.meta["val"].half()
        self.assertExpectedInline(
            self.text(gm),
            """\
SP901 invalid graph: mv: aten.mv.default gives f32[3], the graph says f16[3]
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_refused_operands(self) -> None:
        gm, node = self.graph()
        node.args = node.args[::-1]
        self.assertExpectedInline(
            self.text(gm),
            """\
SP901 invalid graph: mv: aten.mv.default refuses its operands: matrix @ vector expected, got 1, 2
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_no_origin(self) -> None:
        gm, node = self.graph()
        del node.meta["stack_trace"]
        self.assertExpectedInline(
            self.text(gm),
            """\
SP901 invalid graph: mv: no source location
  legal: meta["stack_trace"], or meta["spx_origin"] naming a pass""",
        )
        node.meta["spx_origin"] = "a-pass"
        verify_graph(gm, Stage.GLOBAL, MESH)

    def test_no_example_value(self) -> None:
        gm, node = self.graph()
        del node.meta["val"]
        self.assertExpectedInline(
            self.text(gm),
            """\
SP901 invalid graph: mv: no example value in meta["val"]
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_use_before_definition(self) -> None:
        gm, node = self.graph()
        first = next(iter(gm.graph.nodes))
        first.prepend(node)
        text = self.text(gm)
        assert text.startswith(
            "SP901 invalid graph: not a well formed graph: Argument 'x_1' of Node 'mv' was used before"
        )
        assert "\n" not in text

    def started(self, read: Any) -> fx.GraphModule:
        def function(x: torch.Tensor) -> Any:
            return read(c10d.all_reduce.default(x, "sum", "cp"))

        return traced(function, torch.randn(3))

    def test_read_before_its_wait(self) -> None:
        gm = self.started(lambda x: (x * 2, c10d.wait_tensor.default(x)))
        self.assertExpectedInline(
            self.text(gm, Stage.SCHEDULE),
            """\
SP901 invalid graph: mul: reads all_reduce before its wait
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )

    def test_returned_before_its_wait(self) -> None:
        self.assertExpectedInline(
            self.text(self.started(lambda x: x), Stage.SCHEDULE),
            """SP901 invalid graph: output: reads all_reduce before its wait""",
        )

    def test_never_waited_for(self) -> None:
        gm = self.started(c10d.wait_tensor.default)
        wait = next(n for n in gm.graph.nodes if n.target is c10d.wait_tensor.default)
        wait.replace_all_uses_with(next(iter(gm.graph.nodes)))
        gm.graph.erase_node(wait)
        self.assertExpectedInline(
            self.text(gm, Stage.SCHEDULE),
            """\
SP901 invalid graph: all_reduce: started but never waited for
  at /home/somebody/model.py:7 in forward
      y = x * w""",
        )


VALID = {
    "vary": lambda x, w: total((shard(x) * spx.vary(w, "cp", 2)).sum()),
    "gather to I": lambda x, w: spx.all_gather(shard(x), 0, 4, "cp", 2, "contiguous", "I") * 2,
    "gather, scatter": lambda x, w: total(
        spx.reduce_scatter(
            spx.all_gather(shard(x), 0, 4, "cp", 2, "zigzag", "R") * shard(x).sum(), 0, "cp", 2, "contiguous"
        ).sum()
    ),
    "other shards": lambda x, w: total(
        spx.mask_padding(
            spx.reorder(shard(x), 0, 4, "cp", 2, "contiguous", "zigzag")
            * spx.all_to_all(shard(x)[:, None], "cp", 2).flatten(),
            0, 3, "cp", 2, "zigzag", 0.0,
        ).sum()
    ),
    "two axes": lambda x, w: total(total(shard(shard(x), "tp").sum(), axis="tp"), axis="cp"),
    "numbers without gradient mix": lambda x, w: total((shard(x) * torch.arange(2)).sum()),
    "a sum of sums": lambda x, w: total(total(shard(x).sum(), "R") * shard(x).sum()),
    "shapes do not vary": lambda x, w: torch.zeros_like(shard(x)) + w,
    "a constant": lambda x, w: torch.arange(3),
    "parts of a constant": lambda x, w: spx.all_gather(torch.ones(2) * 3, 0, 4, "cp", 2, "contiguous", "I"),
    "whole integers may leave": lambda x, w: spx.all_gather(shard(x).long(), 0, 4, "cp", 2, "contiguous", "R"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_valid(name: str) -> None:
    assert verdict(VALID[name]) == ""


def test_what_needs_no_gradient_may_mix() -> None:
    def forgotten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return total((shard(x) * w).sum())

    assert "missing vary" in verdict(forgotten)
    assert verdict(forgotten, trainable=["x_1"]) == ""
    assert verdict(lambda x, w: total((shard(x) * w.detach()).sum())) == ""
    assert "missing vary" in verdict(lambda x, w: total((shard(x) * (2 * w).sin()).sum()))
    assert "missing vary" in verdict(lambda x, w: total(torch.cat([shard(x), w]).sum()))


def test_trainable_comes_from_the_example_values_by_default() -> None:
    def forgotten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return total((shard(x) * w).sum())

    gm = traced(forgotten, torch.randn(4), torch.randn(2))
    verify_graph(gm, Stage.LOCAL, MESH)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta["val"].requires_grad_()
    with pytest.raises(InvalidGraph, match="missing vary"):
        verify_graph(gm, Stage.LOCAL, MESH)


def test_sharded_outputs_and_inputs() -> None:
    assert "varying value" in verdict(lambda x, w: shard(x))
    assert verdict(lambda x, w: shard(x), sharded_outputs=True) == ""
    states = {"x_1": {"cp": "S"}}
    assert "shard is I -> S, but x_1 is S" in verdict(lambda x, w: shard(x), input_states=states)
    assert verdict(lambda x, w: total(x.sum()), input_states=states) == ""


def test_an_op_of_its_own_that_communicates_needs_a_shard() -> None:
    _LIBRARY.define("test_ring(Tensor q, Tensor? ids, str axis) -> Tensor")
    torch.library.register_fake("spx::test_ring", lambda q, ids, axis: q.new_empty(q.shape), lib=_LIBRARY)
    assert verdict(lambda x, w: total(spx.test_ring(shard(x), torch.arange(4), "cp").sum())) == ""
    assert "communicates on cp, but none of its operands is S" in verdict(
        lambda x, w: spx.test_ring(x, torch.arange(4), "cp")
    )


@pytest.mark.parametrize("stage", Stage)
def test_symbolic_sizes_are_verified_without_new_guards(stage: Stage) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        parts = spx.shard(x, 0, "cp", 2, "zigzag", 0.0)
        y = spx.all_gather(parts.reshape(-1).view(parts.shape), 0, x.shape[0], "cp", 2, "zigzag", "I")
        return y.reshape(-1, w.shape[0]) @ w, torch.nonzero(w).sum()

    shape_env = ShapeEnv(allow_dynamic_output_shape_ops=True)
    mode = FakeTensorMode(shape_env=shape_env)
    x, w = mode.from_tensor(torch.randn(6, 3)), mode.from_tensor(torch.randn(3))
    gm = traced(function, x, w, mode="real")
    guards = list(shape_env.guards)
    verify_graph(gm, stage, MESH)
    assert shape_env.guards == guards
    view = gm.graph.find_nodes(op="call_function", target=spx.shard.default)[0]
    view.meta["val"] = x
    with pytest.raises(InvalidGraph, match=r"gives f32\[2\*.*, the graph says f32\[s"):
        verify_graph(gm, stage, MESH)
