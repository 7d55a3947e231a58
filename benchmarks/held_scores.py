"""Megatron's own programs, from this compiler: what autograd of eager PyTorch keeps, on one rank of tensor parallelism.

A GPT with their dropout is captured, sharded and cut as every model is, with two differences that make it theirs and
not ours: attention stays written out, and the graph is cut by torch's default partitioner, which keeps what the
backward of each op reads, as eager autograd does, instead of what is cheapest to keep.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from megatron_gpt import MegatronGPT, Sizes
from published import WAYS, Trained
from torch._functorch.partitioners import default_partition
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.graph.storage import root_of
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
from spcompile.schedule.communication import depend_on_tangents, module_path_of
from spcompile.schedule.op_cost import CostModel, bytes_of, cost_model, readers_of
from spcompile.schedule.timeline import starts

RANKS = 8  # of tp
DEPTHS = (1, 2)  # layers of the programs whose seconds are compared: nothing hides behind a next layer
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
    """Costs of Megatron's kernels in 2022, as its source and the paper tell them.

    Softmax is one kernel with the scale and the mask before it, forward and backward, and so is a layer norm. The
    elementwise calls between are fused: bias and GELU; bias, dropout and residual. A kernel of dropout draws its own
    part in registers, and writes the mask where it is kept; this compiler draws the whole, on every rank, to equal one
    device, which costs nothing here. Their sequence is the first dim, so that nothing is copied around a gather.
    """

    def share_a_kernel(self, producer: fx.Node, reader: fx.Node) -> bool:
        if _packet(producer) in (*_NORMS, torch.ops.aten._softmax):
            return False
        if _packet(reader) in (*_NORMS, torch.ops.aten._softmax_backward_data):
            return False
        return super().share_a_kernel(producer, reader)

    def _traffic(self, node: fx.Node) -> float:
        if _is_drawn(node):
            is_kept = any(user.op == "output" for user in node.users)
            return bytes_of(node) / self.accelerator.bytes_per_second if is_kept else 0.0
        return 0.0 if _reorders(node) else super()._traffic(node)

    def one_after_the_other(self, graph: fx.Graph) -> float:
        """Seconds of a graph in which nothing hides but gathers of what was saved, behind products (section 4.2.2)."""
        of_gradient = depend_on_tangents(graph)
        found = 0.0
        for node in graph.nodes:
            if not starts(node):
                found += self.work(node).seconds
            elif node in of_gradient or not of_gradient:
                found += self.communication(node)
        return found


_NORMS = (torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward)


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _reorders(node: fx.Node) -> bool:
    """Whether a copy only puts blocks of ranks in order, behind a gather or before a reduce-scatter."""
    if node.target is not torch.ops.aten.clone.default:
        return False
    return starts(root_of(node.all_input_nodes[0])) or any(starts(reader) for reader in readers_of(node))


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


def _phase_seconds(model: Trained, way: str) -> tuple[PhaseSeconds, PhaseSeconds]:
    recompute, megatron_sp = WAYS[way]
    few, more = (_seconds(program, recompute) for program in _two_depths(model, megatron_sp))
    return few, more


def layer_milliseconds(model: Trained, way: str) -> tuple[float, float]:
    """(forward, backward) of one layer more."""
    few, more = _phase_seconds(model, way)
    scale = 1e3 / (DEPTHS[1] - DEPTHS[0])
    backward = more.backward + more.again - few.backward - few.again
    return scale * (more.forward - few.forward), scale * backward


def step_seconds(model: Trained, way: str) -> float:
    """Of all layers, embeddings, loss and the optimizer."""
    few, _ = _phase_seconds(model, way)
    forward, backward = (1e-3 * found for found in layer_milliseconds(model, "SP" if WAYS[way][1] else "none"))
    outside = few.forward + few.backward - DEPTHS[0] * (forward + backward)
    return outside + model.layers * 1e-3 * sum(layer_milliseconds(model, way)) + _optimizer_seconds(model)


def _seconds(program: Program, recompute: str) -> PhaseSeconds:
    cost = TheirKernels(program.cost.mesh, program.cost.accelerator, program.cost.links, program.cost.fuses)
    forward, backward = (program.graphs[phase].graph for phase in ("forward", "backward"))
    once = cost.one_after_the_other(forward)
    again = {"none": 0.0, "full": once, "selective": _core_seconds(forward, cost)}[recompute]
    return PhaseSeconds(once, cost.one_after_the_other(backward), again)


def _core_seconds(forward: fx.Graph, cost: CostModel) -> float:
    """Of the calls of `CoreAttention`, which send nothing."""
    return sum(cost.work(node).compute for node in forward.nodes if ".core." in f"{module_path_of(node)}.")


# Bytes that Megatron's Float16OptimizerWithFloat16Params moves for a parameter, kernel by kernel.
OPTIMIZER_BYTES = {
    "gradients set to 0": 2,
    "gradients copied to 32 bits": 2 + 4,
    "unscaled, and looked at for infinities": 4 + 4,
    "norm": 4,
    "clipped": 4 + 4,
    "Adam: gradient, parameter and two states read, three of them written": 4 * 4 + 3 * 4,
    "parameters copied back to 16 bits": 4 + 2,
}


def _optimizer_seconds(model: Trained) -> float:
    """All of it moves memory and computes next to nothing."""
    with torch.device("meta"):
        built = MegatronGPT(Sizes(model.layers, model.heads, model.dim, model.seq))
    moved = sum(OPTIMIZER_BYTES.values()) * sum(p.numel() for p in built.parameters()) / RANKS
    return moved / ACCELERATORS["a100"].bytes_per_second
