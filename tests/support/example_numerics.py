"""Outputs and gradients of the graphs of an example: on one device, and on all ranks in the simulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import Tensor

import spcompile.check.attention_specs  # noqa: F401  (the simulator learns ring attention)
from spcompile.capture.retrace import capture
from spcompile.check.simulate import Simulator
from spcompile.diagnostics import Remark
from spcompile.graph.printer import op_name
from spcompile.machine.mesh import MeshShape
from spcompile.machine.rank_parts import part_of
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.build import LocalProgram, build
from spcompile.report.example_runs import with_dynamo_graph

Numbers = tuple[list[Tensor], list[Tensor]]  # outputs, gradients of the inputs that require one


def copies(inputs: Sequence[Any]) -> list[Any]:
    """New leaves with the same values."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for every output, the same in every run."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in outputs]


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def leaves_of(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def on_one_device(function: Callable[..., Any], inputs: Sequence[Any]) -> Numbers:
    given = copies(inputs)
    torch.manual_seed(3)
    outputs = as_list(function(*given))
    return outputs, list(torch.autograd.grad(outputs, leaves_of(given), cotangents(outputs)))


def on_all_ranks(gm: fx.GraphModule, inputs: Sequence[Any], mesh: Mapping[str, int]) -> list[Numbers]:
    """Every rank gets the whole inputs, or its rows, and must return the whole outputs and gradients."""
    shape = MeshShape.of(mesh)
    parts = [dict.fromkeys(n.meta.get("parts", {}), 0) for n in gm.graph.find_nodes(op="placeholder")]
    given = [
        [part_of(x, dims, shape, rank) if dims else x for x, dims in zip(copies(inputs), parts, strict=True)]
        for rank in range(shape.world_size)
    ]
    torch.manual_seed(3)
    results = [as_list(outputs) for outputs in Simulator(shape).run(gm, given)]
    flat = [x for outputs in results for x in outputs]
    leaves = [leaf for rank_inputs in given for leaf in leaves_of(rank_inputs)]
    grads = torch.autograd.grad(flat, leaves, [g for outputs in results for g in cotangents(outputs)])
    width = len(leaves) // len(given)
    return [(outputs, list(grads[r * width : (r + 1) * width])) for r, outputs in enumerate(results)]


def after_autograd(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    inputs: Sequence[Any],
    mesh: Mapping[str, int],
    in_flight: Literal["poison", "late"],
) -> list[Numbers]:
    """The same from a forward and a backward graph that AOTAutograd made (one output)."""
    simulator = Simulator(MeshShape.of(mesh), in_flight)
    world = simulator.mesh.world_size
    with torch.no_grad():
        results = [list(r) for r in simulator.run(forward, [copies(inputs) for _ in range(world)])]
        outputs = [r[:1] for r in results]
        saved = [sorted(r[1:], key=lambda x: isinstance(x, Tensor)) for r in results]  # backward takes sizes first
        rank_inputs = [[*s, *cotangents(o)] for s, o in zip(saved, outputs, strict=True)]
        grads = simulator.run(backward, rank_inputs)
    return [(o, [g for g in rank if g is not None]) for o, rank in zip(outputs, grads, strict=True)]


def assert_equal(found: Numbers, expected: Numbers) -> None:
    """To 1e-10 of the largest element, in float64."""
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, float(b.detach().abs().max())))


def compiled_locally(
    function: Callable[..., Any], inputs: Sequence[Any], mesh: Mapping[str, int], **options: Any
) -> tuple[LocalProgram, Callable[..., Any], list[Any]]:
    """(one rank's program, Dynamo's graph as plain torch runs it, the inputs of both)."""

    def work(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        return build(gm, given, MeshShape.of(mesh), Options(**options), PIPELINE), gm.forward, list(given)

    return with_dynamo_graph(function, inputs, work)


def check_pipeline(
    function: Callable[..., Any], inputs: Sequence[Any], mesh: Mapping[str, int], **options: Any
) -> LocalProgram:
    """Outputs and gradients on every rank after the LOCAL stage are those of one device; returns the program."""
    program, plain, given = compiled_locally(function, inputs, mesh, **options)
    expected = on_one_device(plain, given)
    for rank in on_all_ranks(program.gm, given, mesh):
        assert_equal(rank, expected)
    return program


def captured(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """What capture makes of a function; its placeholders in the order in which the function uses its inputs."""
    return with_dynamo_graph(function, inputs, capture)


def after_pass(name: str, function: Callable[..., Any], inputs: Sequence[Any], degree: int = 2, **options: Any) -> Any:
    """The program after the pipeline up to and with the pass `name`."""
    names = [p.name for p in PIPELINE]
    passes = PIPELINE[: names.index(name) + 1]

    def work(gm: fx.GraphModule, given: Sequence[Any]) -> LocalProgram:
        return build(gm, given, MeshShape.of({"cp": degree}), Options(**options), passes)

    return with_dynamo_graph(function, inputs, work)


def nodes_of(program: LocalProgram, op: str) -> list[fx.Node]:
    """The calls of an op, by its printed name."""
    return [n for n in program.gm.graph.nodes if n.op == "call_function" and op_name(n) == op]


def remarks_of(program: LocalProgram, code: str) -> list[Remark]:
    return [remark for remark in program.ctx.remarks.rows if remark.code == code]
