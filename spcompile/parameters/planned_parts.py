"""Graphs over whole parameters become graphs over the parts that `parallelize` would leave on a rank; no process group.

The graph then reads each parameter through global views, as that of a parallelized model does
(`spcompile/parameters/sharded_modules.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.retrace import fake_inputs
from spcompile.graph.edit import copy_graph, copy_module
from spcompile.parameters.sharded_modules import Parts, local_shape


def over_planned_parts(
    gm: fx.GraphModule, inputs: Sequence[Any], parts: Sequence[Parts]
) -> tuple[fx.GraphModule, list[Any]]:
    """A Dynamo graph and its inputs; parts: how each input is split, () where it is whole."""
    if not any(parts):
        return gm, list(inputs)
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    mode, fakes = fake_inputs(inputs)
    for index, (node, own) in enumerate(zip(result.graph.find_nodes(op="placeholder"), parts, strict=True)):
        if own and node.users:
            node.meta.pop("example_value", None)
            _read_through_views(node, own, tuple(fakes[index].shape), node)
        if own:
            whole = fakes[index]
            with mode:
                part = torch.empty(local_shape(whole.shape, own), dtype=whole.dtype, device=whole.device)
            fakes[index] = part.requires_grad_(whole.requires_grad)
    result.recompile()
    return result, list(fakes)


def _read_through_views(node: fx.Node, parts: Parts, shape: tuple[int, ...], behind: fx.Node) -> None:
    """behind: the node behind which the views go."""
    readers = list(node.users)
    trace = next((user.meta["stack_trace"] for user in readers if "stack_trace" in user.meta), None)
    value = node
    for part in parts:
        args = (value, part.dim, shape[part.dim], part.axis, part.degree, "contiguous", "I")
        with node.graph.inserting_after(behind):
            value = behind = node.graph.call_function(torch.ops.spx.all_gather.default, args)
        if trace is not None:
            value.meta["stack_trace"] = trace
    for reader in readers:
        reader.replace_input_with(node, value)


def captured_over_planned_parts(
    captured: fx.GraphModule, inputs: Sequence[Any], parts: Sequence[Parts]
) -> tuple[fx.GraphModule, list[Any]]:
    """The same of a captured graph, as a copy: what is read is the view, whose example value is the whole."""
    result = copy_module(captured)
    mode, fakes = fake_inputs(inputs)
    placeholders = result.graph.find_nodes(op="placeholder")
    last = placeholders[-1]
    for index, (node, own) in enumerate(zip(placeholders, parts, strict=True)):
        if not own:
            continue
        whole = fakes[index]
        with mode:
            part = torch.empty(local_shape(whole.shape, own), dtype=whole.dtype, device=whole.device)
        fakes[index] = part.requires_grad_(whole.requires_grad)
        node.meta["val"] = fakes[index]
        if node.users:
            _read_through_views(node, own, tuple(whole.shape), last)
            _note_examples(node, own, whole, mode)
    result.recompile()
    return result, list(fakes)


def _note_examples(node: fx.Node, parts: Parts, whole: torch.Tensor, mode: Any) -> None:
    """Give the chain of views their example values: each is larger by what its axis splits."""
    shape = list(node.meta["val"].shape)
    for part in parts:
        (node,) = node.users
        shape[part.dim] *= part.degree
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=whole.dtype, device=whole.device)
