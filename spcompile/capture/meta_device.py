"""Graphs of models on `meta` become graphs on a device, with fake tensors for inputs.

Some composite losses of torch have a kernel for `meta` and therefore no gradient there (checked with torch 2.13:
`aten::nll_loss`), so a model on `meta` must not be differentiated as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.retrace import OWN, fake_inputs
from spcompile.graph.edit import copy_graph

CPU = torch.device("cpu")


def off_meta(gm: fx.GraphModule, inputs: Sequence[Any], device: torch.device = CPU) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a Dynamo graph with `device` for `meta`, and its inputs as fakes there where they were on `meta`."""
    if not any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in inputs):
        return gm, list(inputs)
    mode, fakes = fake_inputs(inputs)
    with mode:
        return _moved(gm, device), [_put_on(device, x) for x in fakes]


def _put_on(device: torch.device, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type != "meta":
        return value
    new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return new.requires_grad_(value.requires_grad)


def _moved(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    for node in result.graph.nodes:
        node.args = _replaced(node.args, device)
        node.kwargs = _replaced(node.kwargs, device)
        if node.op == "placeholder" and OWN in node.meta:
            node.meta[OWN] = _put_on(device, node.meta[OWN])
        if node.op == "get_attr" and isinstance(child := getattr(gm, str(node.target), None), fx.GraphModule):
            setattr(result, str(node.target), _moved(child, device))
    result.recompile()
    return result


def _replaced(value: Any, device: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "meta":
            return device
        return str(device) if leaf == "meta" and isinstance(leaf, str) else leaf

    return torch.utils._pytree.tree_map(moved, value)
