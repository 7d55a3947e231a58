"""bucket-collectives on parameters that ranks hold parts of: gathers and reduce-scatters, any dim, any budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import spcompile.check.attention_specs  # noqa: F401  (the simulator learns ring attention)
from spcompile.check.simulate import Simulator
from spcompile.diagnostics import Remarks
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes.schedule.bucket_collectives import BucketCollectives
from spcompile.passes_api import Context
from spcompile.program.build import build
from spcompile.program.trace import through_dynamo
from spcompile.report.example_runs import graphs_after_autograd
from spcompile.sharding.global_view import Part, global_view

DIMS = {"a_DE": 0, "b_ED": 1, "c_D": 0, "d_DD": 1}
SHAPES = {"a_DE": (8, 12), "b_ED": (12, 8), "c_D": (8,), "d_DD": (8, 8)}
c10d = torch.ops._c10d_functional


def block(x_BSD: Tensor, w: dict[str, Tensor]) -> Tensor:
    x_BNSD = (x_BSD @ w["d_DD"])[:, None]
    x_BSD = torch.nn.functional.scaled_dot_product_attention(x_BNSD, x_BNSD, x_BNSD, is_causal=True)[:, 0]
    return (torch.tanh(x_BSD @ w["a_DE"]) @ w["b_ED"] * w["c_D"]).square().sum()


class OverParts(nn.Module):
    def __init__(self, whole: dict[str, Tensor], degree: int) -> None:
        super().__init__()
        self.degree = degree
        for name, x in whole.items():
            self.register_parameter(name, nn.Parameter(x.detach().chunk(degree, DIMS[name])[0].clone()))

    def forward(self, x_BSD: Tensor) -> Tensor:
        parts = {name: (Part(dim, "cp", self.degree),) for name, dim in DIMS.items()}
        return block(x_BSD, {name: global_view(getattr(self, name), part) for name, part in parts.items()})


def graphs_of(
    model: nn.Module, x_BSD: Tensor, degree: int, bucket_mib: float
) -> tuple[dict[str, fx.GraphModule], list[str]]:
    """The final graphs, and which parameter each input of the forward is; "" for x."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        options = Options(compiler="eager", attention="ring", passes={"bucket-collectives": {"bucket_mib": bucket_mib}})
        program = build(gm, inputs, MeshShape.of({"cp": degree}), options, PIPELINE)
        found.extend((graphs_after_autograd(program), [names.get(id(value), "") for value in inputs]))

    through_dynamo(model, (x_BSD,), backend)
    return found[0], found[1]


def count(gm: fx.GraphModule, op: str) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=getattr(c10d, op).default))


def fused_over_both_axes(sizes: Sequence[int], fuse: BucketCollectives) -> tuple[fx.GraphModule, int]:
    """Three parameters, gathered over dp, over cp, and over cp and then dp; fused, with the same results on all ranks.

    Returns the graph, and how many collectives were replaced.
    """

    def gather(x: Tensor, axis: str, to: str) -> Tensor:
        return torch.ops.spx.all_gather(x, 0, 2 * x.shape[0], axis, 2, "contiguous", to)

    def forward(primals_1: Tensor, primals_2: Tensor, primals_3: Tensor) -> Tensor:
        first = gather(primals_1, "dp", "R").sum()
        second = first * gather(primals_2, "cp", "I").sum()
        return second * gather(gather(primals_3, "cp", "I"), "dp", "R").sum()

    given = [torch.randn(size, dtype=torch.float64) for size in sizes]
    gm = make_fx(forward, tracing_mode="fake")(*given)
    shape = MeshShape.of({"dp": 2, "cp": 2})
    wanted = Simulator(shape).run(gm, [given] * 4)
    replaced = fuse.run(gm, Context(shape, Options(), Remarks()))
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(Simulator(shape).run(gm, [given] * 4), wanted)
    return gm, replaced


def test_a_bucket_whose_members_another_one_has_moved_up() -> None:
    """A parameter split over both axes: the gather over cp goes in front of the bucket over dp that reads it."""
    gm, replaced = fused_over_both_axes((3, 4, 5), BucketCollectives())
    assert replaced == 4
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.spx.all_gather.default)) == 2


@pytest.mark.parametrize("limit", [40, 70, 100, 140, 180])
def test_a_message_of_several_parameters_goes_up_with_all_that_is_in_it(limit: int) -> None:
    """A bucket over cp that is full early is read by one over dp, whose first member stands in front of both."""
    fused_over_both_axes((3, 8, 2), BucketCollectives(bucket_mib=limit / 2**20))


@pytest.mark.thinned(10)
@pytest.mark.parametrize(("bucket_mib", "gathers"), [(25.0, 1), (1e-3, 2), (0.0, 4)])
@pytest.mark.parametrize("degree", [2, 4])
def test_parts_of_gradients_are_those_of_the_whole(degree: int, bucket_mib: float, gathers: int) -> None:
    whole = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()}
    x_BSD = torch.randn(2, 8, 8, dtype=torch.float64)
    loss = block(x_BSD, whole)
    loss.backward()
    graphs, inputs = graphs_of(OverParts(whole, degree), x_BSD, degree, bucket_mib)
    assert count(graphs["forward"], "all_gather_into_tensor") == gathers
    assert count(graphs["backward"], "reduce_scatter_tensor") == gathers

    simulator = Simulator(MeshShape.of({"cp": degree}), "late")
    given = [
        [whole[name].detach().chunk(degree, DIMS[name])[rank].clone() if name else x_BSD for name in inputs]
        for rank in range(degree)
    ]
    with torch.no_grad():
        results = simulator.run(graphs["forward"], given)
        grads = simulator.run(graphs["backward"], [[*row[1:], torch.ones_like(loss)] for row in results])
    for rank, (row, rank_grads) in enumerate(zip(results, grads, strict=True)):
        torch.testing.assert_close(row[0], loss.detach(), rtol=1e-12, atol=1e-12)
        for name, grad in zip(inputs, rank_grads, strict=True):
            if name:
                expected = whole[name].grad
                assert expected is not None
                mine = expected.chunk(degree, DIMS[name])[rank]
                torch.testing.assert_close(grad, mine, rtol=1e-12, atol=1e-12, msg=name)
