"""From one rank's graph to a callable: AOTAutograd, the SCHEDULE stage on forward and backward, then the executor."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.capture.autocast import autocast_off
from spcompile.capture.gradient_ops import erase_gradient_ops
from spcompile.collectives import erase_identities
from spcompile.graph.edit import copy_module, is_getitem
from spcompile.memory.planner import MemoryPlan, Wish
from spcompile.passes_api import PassReport, Stage
from spcompile.program import recompute
from spcompile.program.build import LocalProgram
from spcompile.program.log_texts import without_log_texts
from spcompile.program.memory_remarks import remark_memory
from spcompile.program.partition import Partitioner
from spcompile.program.pipeline import run_passes
from spcompile.program.program_cache import sources
from spcompile.program.ranges import interpreter, labels_of
from spcompile.program.replayed_draws import partitioned
from spcompile.program.zero_terms import drop_zero_terms
from spcompile.schedule.keep_order import KEEP_THE_ORDER
from spcompile.schedule.op_cost import cost_model
from spcompile.torch_private import (
    CustomGraphPass,
    aot_autograd,
    autograd_result,
    compile_fx,
    compile_fx_inner,
    make_boxed_func,
    min_cut_rematerialization_partition,
)

_SEEDS = (torch.ops.aten.randint.low, torch.ops.aten.randint.default)


@dataclass
class Emission:
    """How the graphs after autograd become code.

    bind: replaces axis names by this process's groups in a finished graph (nothing for a dry run).
    finished: called with ("forward" | "backward" | "inference", graph) when a graph is final, before it is bound.
    graphs: the final graphs by phase, unbound.
    wish: how much memory a step may take. memory: what was chosen, where there is a backward.
    keep: leave in `result` what AOTAutograd made, to be stored, if it can be; the backward is then compiled with the
        forward, not when it is first called.
    """

    program: LocalProgram
    bind: Callable[[fx.Graph], Any]
    finished: Callable[[str, fx.GraphModule], None] = lambda phase, gm: None
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    wish: Wish = field(default_factory=Wish)
    memory: MemoryPlan | None = None
    keep: bool = False
    result: Any = None

    def partitioner(self, base: Callable[..., Any]) -> Partitioner:
        """`base`, under a plan of memory, which is left in `memory`."""
        context = self.program.ctx
        return Partitioner(base, self.wish, cost_model(context.mesh, context.options), self._planned)

    def _planned(self, plan: MemoryPlan) -> None:
        self.memory = plan
        remark_memory(plan, self.program.ctx.remarks)

    def schedule(self, gm: fx.GraphModule, phase: str) -> None:
        """The SCHEDULE stage on one graph after autograd, in place. The module's code is left as it was."""
        program = self.program
        for node in gm.graph.nodes:
            if "stack_trace" not in node.meta:
                node.meta["spx_origin"] = "autograd"
        run_passes(gm, program.schedule, program.ctx, program.history)
        program.history.add(phase, Stage.SCHEDULE, gm, program.ctx, PassReport())
        kept = copy_module(gm)
        self.graphs[phase] = kept
        self.finished(phase, kept)
        self.bind(gm.graph)


def prepare_joint(graph: fx.Graph, regather: bool = True) -> None:
    """On the joint graph: drop what was there to create a gradient, and say what must not be saved.

    Seeds are saved: drawn again, they would be others. A constant of a checkpointed region is made again also where
    another region has an equal one, of which the partitioner makes one and then would save it.
    """
    erase_identities(graph)
    erase_gradient_ops(graph)
    drop_zero_terms(graph)
    recompute.tag_recomputed(graph, regather)
    for node in graph.nodes:
        if node.target in _SEEDS:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        elif "ac_graph_id" in node.meta and not node.all_input_nodes and not node.is_impure():
            del node.meta["ac_graph_id"]


def _prepared(partitioner: Callable[..., Any], regather: bool) -> Callable[..., Any]:
    """A partitioner that prepares the joint graph first."""

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        prepare_joint(joint.graph, regather)
        return partitioner(joint, joint_inputs, **kwargs)

    return partition


class _PrepareJoint(CustomGraphPass):
    """prepare_joint as a pass of Inductor. Its identity is all that decides on code beside the graph."""

    def __init__(self, regather: bool) -> None:
        self.regather = regather

    def __call__(self, graph: fx.Graph) -> None:
        prepare_joint(graph, self.regather)

    def uuid(self) -> bytes:
        return f"{sources()} regather={self.regather}".encode()


class _BehindUsersOwn(CustomGraphPass):
    """What a user's configuration of Inductor names, one pass or several, then one of this project."""

    def __init__(self, own: Any, then: CustomGraphPass) -> None:
        self.passes = [*(own if isinstance(own, (list, tuple)) else [own]), then]

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        """None, which is no caching, where a pass has no identity."""
        found = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in found else found


def emit(emission: Emission, compiler: str) -> Callable[..., Any]:
    """A callable over the local graph's inputs, differentiable."""
    gm, inputs = emission.program.gm, emission.program.inputs
    with without_log_texts():
        return _inductor(emission, gm, inputs) if compiler == "inductor" else _eager(emission, gm, inputs)


def emit_nothing(emission: Emission) -> None:
    """The final graphs, in `graphs`, and no code for them: AOTAutograd is left behind the partitioner."""
    graphs = cut(emission.program, emission.partitioner(min_cut_rematerialization_partition))
    with torch.no_grad(), autocast_off():  # as AOTAutograd calls its compilers
        for phase, gm in graphs.items():
            emission.schedule(gm, phase)


class _Known(Exception):
    """Leaves AOTAutograd when all that was asked for is known."""


@dataclass(frozen=True)
class TracedStep:
    """What AOTAutograd makes of a program: the joint graph, or `inference`, the one graph where no gradient is needed.

    inputs, arguments: what a partitioner takes beside the graph.
    """

    joint: fx.GraphModule | None
    inputs: Any = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inference: fx.GraphModule | None = None

    def cut(self, partitioner: Callable[..., Any]) -> dict[str, fx.GraphModule]:
        """Forward and backward by phase, or "inference"."""
        if self.joint is None:
            assert self.inference is not None
            return {"inference": self.inference}
        forward, backward = partitioned(partitioner, self.joint, self.inputs, self.arguments)
        return {"forward": forward, "backward": backward}


def trace_step(program: LocalProgram) -> TracedStep:
    """AOTAutograd up to the partitioner, under its joint graph prepared."""
    found: list[TracedStep] = []
    regather = program.ctx.options.regather

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        prepare_joint(joint.graph, regather)
        found.append(TracedStep(joint, joint_inputs, kwargs))
        raise _Known

    def inference(graph_module: fx.GraphModule, _: Sequence[Any]) -> Any:
        prepare_joint(graph_module.graph, regather)
        found.append(TracedStep(None, inference=graph_module))
        raise _Known

    backend = aot_autograd(fw_compiler=inference, inference_compiler=inference, partition_fn=partition)
    with without_log_texts(), contextlib.suppress(_Known):
        backend(program.gm, program.inputs)
    return found[0]


def cut(
    program: LocalProgram, partitioner: Callable[..., Any] = min_cut_rematerialization_partition
) -> dict[str, fx.GraphModule]:
    """Forward and backward behind the partitioner, or "inference", the one graph where no gradient is needed."""
    return trace_step(program).cut(partitioner)


def _eager(emission: Emission, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    regather = emission.program.ctx.options.regather

    def compiler(phase: str) -> Callable[..., Any]:
        def run(graph_module: fx.GraphModule, _: Sequence[Any]) -> Any:
            emission.schedule(graph_module, phase)
            _reshape_views(graph_module.graph)
            _take_results_apart(graph_module.graph)
            graph_module.recompile()
            return _interpreted(graph_module)

        return run

    def inference(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        prepare_joint(graph_module.graph, regather)
        return compiler("inference")(graph_module, example_inputs)

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        inference_compiler=inference,
        partition_fn=_prepared(emission.partitioner(min_cut_rematerialization_partition), regather),
    )
    return backend(gm, inputs)


def _interpreted(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """Runs a graph call by call. Every value dies with its last reader, inputs too: the caller's list is emptied.

    A function with arguments would keep what the forward saved alive to the end of the backward.
    """

    labels = labels_of(graph_module.graph)
    unread = [node for node in graph_module.graph.nodes if not node.users and node.op != "output"]

    def run(args: list[Any]) -> Any:
        return interpreter(graph_module, labels, unread).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]  # torch 2.13: how AOTAutograd knows that it takes a list
    return run


def _reshape_views(graph: fx.Graph) -> None:
    """`view` becomes `reshape`: some kernels, softplus_backward's is one, leave other strides than their fakes say.

    Inductor makes the strides that it was told.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _take_results_apart(graph: fx.Graph) -> None:
    """Every result of an op with several is taken right behind it: what holds all of them then dies at once."""
    for node in graph.nodes:
        for user in reversed(list(node.users)):
            if is_getitem(user):
                node.append(user)


def _inductor(emission: Emission, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    def inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        emission.schedule(graph_module, _phase(kwargs))
        graph_module.recompile()
        return compile_fx_inner(graph_module, example_inputs, **kwargs)

    partitioner = torch._inductor.config.custom_partitioner_fn or min_cut_rematerialization_partition
    patches: dict[str, Any] = {
        "joint_custom_pre_pass": _PrepareJoint(emission.program.ctx.options.regather),
        "custom_partitioner_fn": emission.partitioner(partitioner),
    }
    if any(p.name == "overlap-collectives" for p in emission.program.schedule):
        patches |= KEEP_THE_ORDER
    for name in ("joint_custom_pre_pass", "post_grad_custom_post_pass"):
        own = getattr(torch._inductor.config, name)
        if own is not None and name in patches:
            patches[name] = _BehindUsersOwn(own, patches[name])
    # A hit in autograd's own cache would skip the SCHEDULE stage and what `finished` is told. So the graph gets a name
    # that no other has: what this cache writes, it never finds. `program_cache` stands above it. The cache of Inductor
    # below sees the bound graph, and is shared.
    gm.spx_compile = uuid.uuid4().hex  # type: ignore[assignment]
    functorch = torch._functorch.config
    with functorch.patch(
        enable_autograd_cache=emission.keep,
        force_non_lazy_backward_lowering=emission.keep or functorch.force_non_lazy_backward_lowering,
    ):
        compiled = callable_of(compile_fx(gm, inputs, inner_compile=inner, config_patches=patches))
    if emission.keep:
        emission.result = autograd_result(compiled)
    return compiled


def as_it_is(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: str, final: Callable[[str, fx.GraphModule], None] | None = None
) -> Callable[..., Any]:
    """A Dynamo graph compiled as a backend of torch does it. final: gets its graphs after autograd, by phase."""
    if compiler == "inductor" and final is None:
        return callable_of(compile_fx(gm, inputs))

    def tell(phase: str, graph_module: fx.GraphModule) -> None:
        if final is not None:
            final(phase, graph_module)

    if compiler == "inductor":

        def inner(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
            tell(_phase(kwargs), graph_module)
            return compile_fx_inner(graph_module, example_inputs, **kwargs)

        with torch._functorch.config.patch(enable_autograd_cache=False):  # a hit would tell nothing
            return callable_of(compile_fx(gm, inputs, inner_compile=inner))

    def run(phase: str) -> Callable[..., Any]:
        def compile_graph(graph_module: fx.GraphModule, _: Sequence[Any]) -> Any:
            tell(phase, graph_module)
            return make_boxed_func(graph_module.forward)

        return compile_graph

    backend = aot_autograd(fw_compiler=run("forward"), bw_compiler=run("backward"), inference_compiler=run("inference"))
    return backend(gm, inputs)


def _phase(kwargs: Mapping[str, Any]) -> str:
    """What Inductor compiles, from what it hands to its inner compiler."""
    return "backward" if kwargs.get("is_backward") else "inference" if kwargs.get("is_inference") else "forward"


def callable_of(compiled: Any) -> Callable[..., Any]:
    """Inductor's result, which is a callable unless it compiled ahead of time."""
    assert callable(compiled), type(compiled)
    return compiled
