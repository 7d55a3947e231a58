"""Megatron's own programs, from this compiler: what autograd of eager PyTorch keeps, on one rank of tensor parallelism.

A GPT with their dropout is captured, sharded and cut as every model is, with two differences that make it theirs and
not ours: attention stays written out, and the graph is cut by torch's default partitioner, which keeps what the
backward of each op reads, as eager autograd does, instead of what is cheapest to keep.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from megatron_gpt import MegatronGPT, Sizes
from published import WAYS, Trained
from torch._functorch.partitioners import default_partition
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import saved_bytes
from spcompile.options import Options
from spcompile.parameters.planned_parts import captured_over_planned_parts
from spcompile.parameters.weight_plan import parts_of_parameter
from spcompile.passes import PIPELINE
from spcompile.planning.search import depths_of
from spcompile.planning.short_step import Short, split_of_parameters
from spcompile.program.build import build_captured
from spcompile.program.emit import Emission, trace_step
from spcompile.program.trace import through_dynamo
from spcompile.schedule.communication import module_path_of
from spcompile.schedule.op_cost import CostModel, bytes_of, cost_model
from spcompile.schedule.timeline import timeline

RANKS = 8  # of tp
DEPTHS = (2, 4)  # layers of the programs whose seconds are compared: of a single layer nothing hides behind the next
WRITTEN_OUT = {"recognize-attention": {"written_out": True}}


@dataclass(frozen=True)
class Program:
    """The final graphs of one rank, by phase."""

    graphs: Mapping[str, fx.GraphModule]
    cost: CostModel

    @property
    def saved(self) -> int:
        """Bytes kept for the backward."""
        return int(saved_bytes(self.graphs))


def program_of(model: Trained, way: str, layers: int, dropout: float = 0.1) -> Program:
    """One of their programs, with so many layers, on one of eight A100."""
    recompute, megatron_sp = WAYS[way]
    passes: dict[str, Any] = dict(WRITTEN_OUT) if megatron_sp else {**WRITTEN_OUT, "split-all-reduce": False}
    options = Options.parse({"outputs": "loss", "accelerator": "a100", "memory": "speed", "passes": passes})
    with torch.device("meta"):
        built = MegatronGPT(Sizes(layers, model.heads, model.dim, model.seq, recompute, dropout)).to(torch.bfloat16)
        ids = torch.zeros(model.micro_batch, model.seq, dtype=torch.int64)
    own = {id(p) for p in built.parameters()}
    found: list[Program] = []

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> None:
        (short,) = depths_of(gm, given, [id(x) in own for x in given], options, PIPELINE).shorts
        found.append(_compiled(short, options))

    with torch.enable_grad():
        through_dynamo(built, {"ids_BS": ids, "labels_BS": ids}, backend, options, 1)
    return found[0]


def _compiled(short: Short, options: Options) -> Program:
    mesh = MeshShape.of({"tp": RANKS})
    split = split_of_parameters(short, mesh, options, PIPELINE)
    placeholders = short.captured.graph.find_nodes(op="placeholder")
    parts = [
        parts_of_parameter(node.meta["val"].shape, split.get(node.name, ""), {"tp": RANKS}, ()) if own else ()
        for node, own in zip(placeholders, short.own, strict=True)
    ]
    program = build_captured(*captured_over_planned_parts(short.captured, short.inputs, parts), mesh, options, PIPELINE)
    emission = Emission(program, bind=lambda graph: None)
    graphs = trace_step(program).cut(as_eager_autograd)
    with torch.no_grad():
        for phase, gm in graphs.items():
            emission.schedule(gm, phase)
    return Program(emission.graphs, cost_model(mesh, options))


def as_eager_autograd(joint: fx.GraphModule, inputs: Any, **arguments: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Torch's default partitioner. Of a mask of dropout the bools are kept, as by native_dropout's own backward.

    split-dropout multiplies with the mask as numbers: those are made again of the bools.
    """
    numbers: set[fx.Node] = set()
    for node in joint.graph.nodes:
        is_bool = any(_dtype(read) is torch.bool for read in node.all_input_nodes)
        of_numbers = bool(node.all_input_nodes) and all(read in numbers for read in node.all_input_nodes)
        if (is_bool and node.target is torch.ops.aten._to_copy.default) or of_numbers:
            numbers.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta.pop("ac_graph_id", None)
    return default_partition(joint, inputs, **arguments)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def saved_by_a_layer(model: Trained, way: str) -> int:
    """Bytes that one layer more keeps for the backward on one rank."""
    one, two = (program_of(model, way, layers).saved for layers in (1, 2))
    return two - one


@dataclass(frozen=True)
class TheirKernels(CostModel):
    """Costs of Megatron's kernels in 2022: softmax and layer norms are kernels of their own, as of apex.

    Elementwise calls between them are fused, as bias with GELU, and bias, dropout and residual. A kernel of dropout
    draws its own part in registers, and writes the mask where it is kept; this compiler draws the whole, on every
    rank, to equal one device, which costs nothing here.
    """

    def is_fused(self, node: fx.Node) -> bool:
        return super().is_fused(node) and getattr(node.target, "overloadpacket", None) not in _OWN_KERNELS

    def _traffic(self, node: fx.Node) -> float:
        if not _is_drawn(node):
            return super()._traffic(node)
        is_kept = any(user.op == "output" for user in node.users)
        return bytes_of(node) / self.accelerator.bytes_per_second if is_kept else 0.0


_OWN_KERNELS = (
    torch.ops.aten._softmax,
    torch.ops.aten._softmax_backward_data,
    torch.ops.aten.native_layer_norm,
    torch.ops.aten.native_layer_norm_backward,
)


def _is_drawn(node: fx.Node) -> bool:
    """Whether a value is made of random numbers alone."""
    if node.target is torch.ops.aten.native_dropout.default:
        return all(read.target is torch.ops.aten.ones.default for read in node.all_input_nodes)
    if node.target is torch.ops.aten.ones.default:
        return all(map(_is_drawn, node.users))
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_drawn, node.all_input_nodes))


@functools.cache
def _two_depths(model: Trained, megatron_sp: bool) -> tuple[Program, Program]:
    """With as many layers as DEPTHS says, and nothing made again."""
    way = "SP" if megatron_sp else "none"
    few, more = (program_of(model, way, layers) for layers in DEPTHS)
    return few, more


@dataclass(frozen=True)
class PhaseSeconds:
    """Of a program. again: of what its recompute runs again, all of the region, as a checkpoint of eager PyTorch does.

    Torch's checkpoint runs a region again from its start, also what no gradient needs, such as its last product. So
    what is made again is taken from the forward of the program without recompute.
    """

    forward: float
    backward: float
    again: float


def _phase_seconds(model: Trained, way: str, reached: float) -> tuple[PhaseSeconds, PhaseSeconds]:
    recompute, megatron_sp = WAYS[way]
    few, more = (_seconds(program, reached, recompute) for program in _two_depths(model, megatron_sp))
    return few, more


def layer_milliseconds(model: Trained, way: str, reached: float) -> tuple[float, float]:
    """(forward, backward) of one layer more. reached: of its peak by an A100 in products."""
    few, more = _phase_seconds(model, way, reached)
    scale = 1e3 / (DEPTHS[1] - DEPTHS[0])
    backward = more.backward + more.again - few.backward - few.again
    return scale * (more.forward - few.forward), scale * backward


def step_seconds(model: Trained, way: str, reached: float) -> float:
    """Of all layers, embeddings, loss and the optimizer."""
    few, _ = _phase_seconds(model, way, reached)
    forward, backward = (1e-3 * found for found in layer_milliseconds(model, "SP" if WAYS[way][1] else "none", reached))
    outside = few.forward + few.backward - DEPTHS[0] * (forward + backward)
    return outside + model.layers * 1e-3 * sum(layer_milliseconds(model, way, reached)) + _optimizer_seconds(model)


def reached_by_products(model: Trained, way: str, forward: float) -> float:
    """With which a layer's forward takes so many milliseconds: found by halving."""
    low, high = 0.1, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if layer_milliseconds(model, way, middle)[0] > forward else (low, middle)
    return (low + high) / 2


def _seconds(program: Program, reached: float, recompute: str) -> PhaseSeconds:
    accelerator = replace(program.cost.accelerator, reached=reached)
    cost = TheirKernels(program.cost.mesh, accelerator, program.cost.links, program.cost.fuses)
    forward, backward = (program.graphs[phase].graph for phase in ("forward", "backward"))
    once = timeline("forward", forward.nodes, cost).seconds
    again = {"none": 0.0, "full": once, "selective": _core_seconds(forward, cost)}[recompute]
    return PhaseSeconds(once, timeline("backward", backward.nodes, cost).seconds, again)


def _core_seconds(forward: fx.Graph, cost: CostModel) -> float:
    """Of the calls of `CoreAttention`, which send nothing."""
    return sum(cost.work(node).compute for node in forward.nodes if module_path_of(node).endswith(".core"))


def _optimizer_seconds(model: Trained) -> float:
    """Adam in mixed precision moves memory: of each parameter it reads the gradient, a copy and two states.

    It writes the last three and the parameter itself, in 16 bits; all else is in 32.
    """
    with torch.device("meta"):
        built = MegatronGPT(Sizes(model.layers, model.heads, model.dim, model.seq))
    moved = (4 * 4 + 3 * 4 + 2) * sum(p.numel() for p in built.parameters()) / RANKS
    return moved / ACCELERATORS["a100"].bytes_per_second
