"""One rank's share of a training step, run for real on one device, and what it allocates; beside the plan of memory.

The other ranks are made up: collectives run on torch's fake process group, which moves nothing. Numbers mean nothing,
but every tensor has the size that it has on a real rank. Weights are drawn at the size that the rank holds; the model
itself may be on `meta`. tests/distributed/test_memory.py shows that real processes save the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.distributed as dist
import torch.fx as fx
import torch.testing._internal.distributed.fake_pg
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from spcompile.capture.autocast import autocast_off
from spcompile.capture.meta_device import off_meta
from spcompile.collectives import gathers_on_gloo
from spcompile.graph.axes import bind_axes, groups_of
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape, RuntimeMesh
from spcompile.memory.account import Memory, memory_of
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.parallelize import planned_weights
from spcompile.parameters.planned_parts import over_planned_parts
from spcompile.passes import PIPELINE
from spcompile.program.build import build
from spcompile.program.emit import Emission, emit
from spcompile.program.trace import through_dynamo
from spcompile.schedule.saved_bytes import saved_bytes_beside


@contextlib.contextmanager
def as_rank(rank: int, mesh: Mapping[str, int], device: str) -> Iterator[RuntimeMesh]:
    """This process as one rank of a mesh whose other ranks do not exist."""
    shape = MeshShape.of(mesh)
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=shape.world_size)
    try:
        yield RuntimeMesh(shape, init_device_mesh(device, tuple(mesh.values()), mesh_dim_names=tuple(mesh)))
    finally:
        dist.destroy_process_group()


@dataclass
class OneRank:
    """The compiled program of one rank with inputs of its sizes. planned: the account of its final graphs."""

    run: Callable[..., Any]
    inputs: list[Any]
    emission: Emission
    planned: Memory

    def forward(self) -> Tensor:
        """The loss."""
        out = self.run(*self.inputs)
        return out[0] if isinstance(out, (list, tuple)) else out

    def step(self) -> None:
        """Forward and backward; gradients stay."""
        self.forward().backward()

    def drop_gradients(self) -> None:
        """As `optimizer.zero_grad()` does."""
        for value in self.inputs:
            if isinstance(value, Tensor):
                value.grad = None

    @property
    def held(self) -> int:
        """Bytes of the parameters."""
        return sum(x.nbytes for x in self.inputs if isinstance(x, Tensor) and x.requires_grad)

    def saved(self) -> int:
        """Bytes that autograd keeps from forward to backward, inputs aside."""
        return saved_bytes_beside([x for x in self.inputs if isinstance(x, Tensor)], self.forward)

    @property
    def planned_peak(self) -> int:
        """Bytes at the peak, parameters and gradients included."""
        return int(self.planned.peak_bytes)


def one_rank(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    mesh: RuntimeMesh,
    *,
    shard_parameters: Sequence[str] = (),
    device: str = "cpu",
    **options: Any,
) -> OneRank:
    """Compile a model, on `meta` as its inputs are, for this rank; call it inside of `as_rank`.

    shard_parameters: the axes over which `parallelize` would split them.
    """
    chosen = Options.parse(options)
    parts = {}
    if shard_parameters:
        planned = planned_weights(model, example_inputs, mesh.shape, chosen, shard_parameters).parts
        parts = {id(p): planned[name] for name, p in model.named_parameters()}
    found: list[OneRank] = []

    def bind(graph: fx.Graph) -> None:
        bind_axes(graph, {axis: mesh.group_name(axis) for axis in groups_of(graph, {})})
        if device == "cpu":
            gathers_on_gloo(graph)

    def compile_graph(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        split = [parts.get(id(value), ()) for value in given]
        moved = off_meta(gm, given, torch.device(device))
        program = build(*over_planned_parts(*moved, split), mesh.shape, chosen, PIPELINE)
        emission = Emission(program, bind=bind, wish=Wish.of(chosen, mesh.shape.world_size))
        both_now = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
        with autocast_off(), both_now:
            run = emit(emission, chosen.compiler)
        inputs = [_made(x, device) for x in program.inputs]
        found.append(OneRank(run, inputs, emission, _account(emission, inputs, chosen)))

    through_dynamo(model, example_inputs, compile_graph, chosen)
    return found[0]


def _made(value: Any, device: str) -> Any:
    """A tensor like a fake one; integers are 0, which is a token, a label and a position."""
    if not isinstance(value, Tensor):
        return value
    new = torch.zeros(value.shape, dtype=value.dtype, device=device)
    if value.dtype.is_floating_point:
        new.normal_(std=0.02)
    return new.requires_grad_(value.requires_grad)


def _account(emission: Emission, inputs: Sequence[Any], options: Options) -> Memory:
    held = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return memory_of(
        emission.graphs,
        sympy.Integer(0),
        held,
        options.states,
        ACCELERATORS[options.accelerator],
        emission.memory,
        fuses=options.compiler == "inductor",
    )
