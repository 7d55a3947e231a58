"""Wide parts that run over tiles of rows: which those are, what is planned, and that numbers stay.

R rows, D width, F width inside the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_models import COST, D, Decoder, stack
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile
from spcompile import models
from spcompile.diagnostics import Remarks
from spcompile.machine.mesh import MeshShape
from spcompile.memory.planner import Wish, plan_memory
from spcompile.memory.row_tiles import WidePart, find_wide_parts
from spcompile.options import Options
from spcompile.passes.schedule.tile_rows import TileRows
from spcompile.passes_api import Context

ROWS, WIDE = 12, 32


def parts_of(function: Callable[..., Any], *inputs: Tensor) -> list[WidePart]:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    return find_wide_parts([node for node in gm.graph.nodes if node.op == "call_function"], lambda node: False)


def weights() -> tuple[Tensor, Tensor]:
    return torch.randn(D, WIDE), torch.randn(WIDE, D)


def test_a_gated_mlp_is_one_part() -> None:
    x_BSD, (up_DF, down_FD), gate_DF = torch.randn(2, ROWS // 2, D), weights(), torch.randn(D, WIDE)

    def mlp(x_BSD: Tensor, up_DF: Tensor, gate_DF: Tensor, down_FD: Tensor) -> Tensor:
        return (F.silu(x_BSD @ gate_DF) * (x_BSD @ up_DF)) @ down_FD

    (part,) = parts_of(mlp, x_BSD, up_DF, gate_DF, down_FD)
    assert (part.rows, part.width) == (ROWS, WIDE)
    assert len(part.products) == 3
    assert len(part.narrow) == 1
    assert not part.whole


def test_gradients_of_weights_are_sums_over_rows() -> None:
    def gradient(x_RD: Tensor, dy_RD: Tensor, up_DF: Tensor, down_FD: Tensor) -> tuple[Tensor, ...]:
        h_RF = x_RD @ up_DF
        dh_RF = (dy_RD @ down_FD.t()) * h_RF.cos()
        return h_RF.sin().t() @ dy_RD, x_RD.t() @ dh_RF, dh_RF.sum(0), dh_RF @ up_DF.t()

    (part,) = parts_of(gradient, torch.randn(ROWS, D), torch.randn(ROWS, D), *weights())
    assert len(part.sums) == 3
    assert len(part.narrow) == 1


def test_what_others_read_stands_whole() -> None:
    def reads(x_RD: Tensor, up_DF: Tensor, down_FD: Tensor) -> tuple[Tensor, Tensor]:
        h_RF = x_RD @ up_DF
        return h_RF.sin().cos() @ down_FD, h_RF.cumsum(0)

    (part,) = parts_of(reads, torch.randn(ROWS, D), *weights())
    assert [node.target for node in part.whole] == [torch.ops.aten.mm.default]
    assert len(part.tiled_away) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x_RD, up_DF, down_FD: (x_RD @ up_DF).softmax(0) @ down_FD,
        lambda x_RD, up_DF, down_FD: (x_RD @ up_DF).view(ROWS, 4, -1).sin(),
        lambda x_RD, up_DF, down_FD: x_RD @ up_DF,
        lambda x_RD, up_DF, down_FD: x_RD.sin() @ torch.ones(D, D),
    ],
    ids=["mixes rows", "heads", "returned", "not wider"],
)
def test_what_is_no_part(function: Callable[..., Any]) -> None:
    assert not parts_of(function, torch.randn(ROWS, D), *weights())


def test_a_part_that_waits_for_its_own_result_gets_it_from_copies() -> None:
    """As where a block is made again for its output, from which the gradient is computed that comes back to it."""

    def both(x_RD: Tensor, up_DF: Tensor, down_FD: Tensor) -> tuple[Tensor, ...]:
        h_RF = x_RD @ up_DF
        y_RD = h_RF.sin() @ down_FD
        dh_RF = (y_RD.cumsum(0) @ down_FD.t()) * h_RF.cos()
        return y_RD, h_RF.sin().t() @ y_RD, dh_RF @ up_DF.t()

    inputs = (torch.randn(ROWS, D).double(), *(weight.double() for weight in weights()))
    gm = make_fx(both, tracing_mode="fake")(*inputs)
    context = Context(MeshShape(()), Options(), Remarks())
    assert TileRows(3).run(gm, context) == 2
    gm.recompile()
    for found, expected in zip(gm(*inputs), both(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
    shapes = [tuple(node.meta["val"].shape) for node in gm.graph.nodes if node.op == "call_function"]
    assert (ROWS, WIDE) not in shapes
    assert all(node.users for node in gm.graph.nodes if node.op == "call_function"), "nothing is left that nobody reads"
    assert TileRows(3).run(gm, context) == 0


@pytest.mark.thinned(4)
def test_a_plan_runs_over_tiles_where_that_is_what_it_needs() -> None:
    joint, saved = stack(3, length=4096)
    least = plan_memory(joint, saved, COST, Wish(least=True))
    plan = plan_memory(joint, saved, COST, Wish(int(1.05 * least.total)))
    assert plan.fits
    assert plan.tiles is not None
    assert least.tiles is not None
    assert least.tiles.count >= plan.tiles.count
    assert plan_memory(joint, saved, COST, Wish(10**12)).tiles is None


def over_tiles(kind: str, length: int) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    if kind == "decoder":
        model, inputs = Decoder(p=0.1).double(), (torch.randn(2, length, D, dtype=torch.float64),)
    else:
        model = models.build(kind, vocab=64, layers=2).double()
        ids_BS = torch.randint(0, 64, (2, length))
        inputs = (ids_BS, ids_BS)
    return model, inputs, {"memory": "min", "passes": {"tile-rows": {"tiles": 3}}}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"tp": 2, "cp": 2}], ids="-".join)
@pytest.mark.parametrize("kind", ["decoder", "llama-tiny", "gpt-tiny"])
@pytest.mark.thinned(30)
def test_numbers_stay_what_they_are(kind: str, mesh: dict[str, int]) -> None:
    model, inputs, options = over_tiles(kind, 101)
    plan = spcompile.explain(model, inputs, mesh, **options)
    assert sum(row.rewrites for row in plan.passes if row.name == "tile-rows") > 0
    report = spcompile.verify(model, inputs, mesh, **options)
    assert report.ok, report


@pytest.mark.thinned(6)
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_process(compiler: str) -> None:
    torch.manual_seed(0)
    model, x_BSD = Decoder().double(), torch.randn(2, 101, D, dtype=torch.float64)
    model(x_BSD).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    options = {"memory": "min", "compiler": compiler, "passes": {"tile-rows": {"tiles": 4}}}
    torch.compile(model, backend="spcompile", options=options)(x_BSD).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)


def test_sums_of_half_precision_are_taken_in_float32() -> None:
    torch.manual_seed(0)
    model, x_BSD = Decoder().bfloat16(), torch.randn(1, 96, D, dtype=torch.bfloat16)
    options = {"memory": "min", "passes": {"tile-rows": {"tiles": 4}}}
    text = spcompile.explain(model, (x_BSD,), {"cp": 2}, **options).graph("backward")
    assert any("f32" in line and "aten.add(" in line and "_to_copy" in line for line in text.splitlines())
