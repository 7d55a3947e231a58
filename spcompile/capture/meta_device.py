"""Graphs of models on `meta` become graphs on `cpu`, with fake tensors for inputs.

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


def off_meta(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a Dynamo graph with `cpu` for `meta`, and its inputs as fakes on `cpu` where they were on `meta`."""
    if not any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in inputs):
        return gm, list(inputs)
    mode, fakes = fake_inputs(inputs)
    with mode:
        return _moved(gm), [_on_cpu(x) for x in fakes]


def _on_cpu(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.device.type != "meta":
        return value
    new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CPU)
    return new.requires_grad_(value.requires_grad)


def _moved(gm: fx.GraphModule) -> fx.GraphModule:
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    for node in result.graph.nodes:
        node.args = _replaced(node.args)
        node.kwargs = _replaced(node.kwargs)
        if node.op == "placeholder" and OWN in node.meta:
            node.meta[OWN] = _on_cpu(node.meta[OWN])
        if node.op == "get_attr" and isinstance(child := getattr(gm, str(node.target), None), fx.GraphModule):
            setattr(result, str(node.target), _moved(child))
    result.recompile()
    return result


def _replaced(value: Any) -> Any:
    def on_cpu(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "meta":
            return CPU
        return "cpu" if leaf == "meta" and isinstance(leaf, str) else leaf

    return torch.utils._pytree.tree_map(on_cpu, value)
