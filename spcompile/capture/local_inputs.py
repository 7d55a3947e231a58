"""Graphs over DTensor parameters become graphs over the parts that this rank holds.

Dynamo traces a parallelized model with DTensors for inputs and `to_local` calls on them. Cut there, capture and
AOTAutograd see plain tensors only, and the gradients that come back through `to_local` are DTensors again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import PACKAGE_FOLDER, CaptureFailed, source_of
from spcompile.graph.edit import copy_graph, operand
from spcompile.torch_private import TracingContext

# What parallelize has put between a module and its parameters is no line of the user's; models of the package are.
_OWN_FRAMES = re.compile(
    rf'  File "{re.escape(PACKAGE_FOLDER)}[/\\](?!models[/\\])[^"]*", line \d+, in .*\n(?:    .*\n?)*'
)


def over_local_parts(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A Dynamo graph and its inputs, with the local part of every DTensor in its place; as they are without DTensors.

    Raises:
        CaptureFailed: the graph reads a DTensor in another way than through `to_local`.
    """
    if not any(isinstance(x, DTensor) for x in inputs):
        return gm, list(inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    sharded = {n.name for n, x in zip(placeholders, inputs, strict=True) if isinstance(x, DTensor)}
    cut = _cut_at_to_local(gm)
    for node in cut.graph.find_nodes(op="placeholder"):
        if node.name in sharded:
            node.meta.pop("example_value", None)
    return cut, [_fake_part(x) for x in inputs]


def on_local_parts(run: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """`run` for callers that pass DTensors where `inputs` has them."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, DTensor)]
    if not places:
        return run

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        local = list(args)
        for i in places:
            local[i] = local[i].to_local()
        return run(*local)

    return call


def _fake_part(value: Any) -> Any:
    """A fake of fixed shape: Dynamo knows the DTensor only, so AOTAutograd would give a real part symbols for sizes."""
    if not isinstance(value, DTensor):
        return value
    context = TracingContext.try_get()
    assert context is not None
    assert context.fake_mode is not None
    local = value.to_local()
    with context.fake_mode:
        part = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device=local.device)
    return part.requires_grad_(value.requires_grad)


def _cut_at_to_local(gm: fx.GraphModule) -> fx.GraphModule:
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    cuts = []
    for node in result.graph.nodes:
        if "stack_trace" in node.meta:
            node.meta["stack_trace"] = _OWN_FRAMES.sub("", node.meta["stack_trace"])
        if node.op == "call_method" and node.target == "to_local":
            cuts.append(node)
        elif node.op == "get_attr" and isinstance(child := getattr(gm, str(node.target), None), fx.GraphModule):
            setattr(result, str(node.target), _cut_at_to_local(child))
        elif any(_is_dtensor(n) for n in node.all_input_nodes) and not _opens_a_region(node):
            raise CaptureFailed(
                f"{node.target} reads a sharded parameter as a DTensor",
                where=source_of(node),
                legal="parameters read as attributes of their modules, in the model's forward",
            )
    for node in cuts:
        node.replace_all_uses_with(operand(node, 0))
        result.graph.erase_node(node)
    result.recompile()
    return result


def _is_dtensor(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("example_value"), DTensor)


def _opens_a_region(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)
