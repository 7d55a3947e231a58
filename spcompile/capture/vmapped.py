"""Writes `torch.vmap` out: in a Dynamo graph it is a region of calls between two switches of the batching level.

Traced below the dispatcher, where batching rules have run, such a region is ops on whole tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.autocast import running_switches
from spcompile.torch_private import _vmap_decrement_nesting, _vmap_increment_nesting


def without_vmaps(gm: fx.GraphModule, fake_mode: Any) -> fx.GraphModule:
    """`gm` with every vmapped region as ops without batching levels; itself where it has none.

    Its nodes hold fakes in meta["example_value"], as Dynamo leaves them. fake_mode: that of the capture.
    """
    if not gm.graph.find_nodes(op="call_function", target=_vmap_increment_nesting):
        return gm
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    region: list[fx.Node] = []
    depth = 0
    with running_switches() as run_switch:  # below the dispatcher autocast has run as well
        for node in gm.graph.nodes:
            depth += node.target is _vmap_increment_nesting
            if depth == 0:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                run_switch(node)
                continue
            region.append(node)
            depth -= node.target is _vmap_decrement_nesting
            if depth == 0:
                _write_out(gm, region, graph, copies, fake_mode)
                region = []
    return fx.GraphModule(gm, graph)


def _write_out(
    gm: fx.GraphModule, region: Sequence[fx.Node], graph: fx.Graph, copies: dict[fx.Node, fx.Node], fake_mode: Any
) -> None:
    """Append to `graph` what the nodes of `region` compute, and note in `copies` what later nodes read."""
    inside = set(region)
    operands = list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]
    child = fx.Graph()
    own = {node: child.placeholder(node.name) for node in operands}
    for node in region:
        own[node] = child.node_copy(node, own.__getitem__)
    child.output([own[node] for node in results])
    with fake_mode, torch.no_grad(), fx.traceback.preserve_node_meta():
        examples = [fake_like(node.meta["example_value"]) for node in operands]
        traced = make_fx(fx.Interpreter(fx.GraphModule(gm, child)).run)(*examples)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), (copies[node] for node in operands), strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            setattr(gm, f"{node.target}_of_{region[0].name}", getattr(traced, str(node.target)))
            values[node] = graph.get_attr(f"{node.target}_of_{region[0].name}")
            continue
        if node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
    (output,) = traced.graph.find_nodes(op="output")
    copies.update(zip(results, (values[node] for node in output.args[0]), strict=True))


def fake_like(x: Any) -> Any:
    """Another fake of the same shape: Dynamo's are of a mode of their own."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
