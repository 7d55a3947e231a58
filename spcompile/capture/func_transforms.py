"""Writes `torch.func` out: in a Dynamo graph `vmap`, `grad`, `vjp` are regions of calls between switches of a level.

Traced below the dispatcher, where batching and derivatives have run, such a region is ops on whole tensors: those of a
gradient as well, of which autograd takes the gradient once more where a loss asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.autocast import running_switches
from spcompile.diagnostics import CaptureFailed, source_of
from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.splice import fake_like
from spcompile.torch_private_func import (
    FORWARD_LEVEL,
    LEVELS,
    SAVING_SWITCHES,
    autograd_grad_of_level,
    get_decompositions,
)

aten = torch.ops.aten
_BEGINS, _ENDS = (tuple(switches) for switches in zip(*LEVELS, strict=True))
# What a gradient within the graph is made of, of which no rule knows and autograd has no gradient: in simpler ops.
_DERIVATIVES = (
    *(aten.gelu_backward, aten.silu_backward, aten.mish_backward, aten.elu_backward, aten.leaky_relu_backward),
    *(aten.threshold_backward, aten.sigmoid_backward, aten.tanh_backward, aten.hardtanh_backward),
    *(aten.softplus_backward, aten.log_sigmoid_backward, aten.hardswish_backward, aten.hardsigmoid_backward),
    *(aten._softmax_backward_data, aten._log_softmax_backward_data),
    *(aten.native_layer_norm, aten.native_layer_norm_backward, aten._fused_rms_norm, aten._fused_rms_norm_backward),
    *(aten.native_group_norm, aten.native_group_norm_backward, aten.native_dropout_backward),
    *(aten.mse_loss_backward, aten.smooth_l1_loss_backward, aten.huber_loss_backward),
    *(aten.nll_loss_backward, aten.nll_loss_forward, aten.binary_cross_entropy_backward),
    *(aten.embedding_dense_backward, aten.select_backward, aten.slice_backward, aten.unfold_backward),
)


def without_levels(gm: fx.GraphModule, fake_mode: Any) -> fx.GraphModule:
    """`gm` with every transformed region as ops without levels; itself where it has none.

    Its nodes hold fakes in meta["example_value"], as Dynamo leaves them. fake_mode: that of the capture.
    """
    regions = _regions(gm.graph)
    if not regions:
        return gm
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    first, inside = {region[0]: region for region in regions}, {node for region in regions for node in region}
    with running_switches() as run_switch:  # below the dispatcher autocast has run as well
        for node in gm.graph.nodes:
            if node in first:
                _write_out(gm, first[node], graph, copies, fake_mode)
            elif node not in inside and node.target not in SAVING_SWITCHES:  # which stand around regions
                copies[node] = graph.node_copy(node, copies.__getitem__)
                run_switch(node)
    return fx.GraphModule(gm, graph)


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """Nodes between the switches of an outermost level, with what `vjp` gives, which is called behind its level."""
    nodes, regions, start = list(graph.nodes), list[list[fx.Node]](), 0
    while start < len(nodes):
        if nodes[start].target not in _BEGINS:
            start += 1
            continue
        end = _closed(nodes, start, start + 1)
        while True:
            inside = set(nodes[start:end])
            calls = [n for n, node in enumerate(nodes[end:], end) if node.target is autograd_grad_of_level]
            late = [n for n in calls if not inside.isdisjoint(nodes[n].all_input_nodes)]
            if not late:
                break
            end = _closed(nodes, start, late[-1] + 1)
        regions.append(nodes[start:end])
        start = end
    return regions


def _closed(nodes: Sequence[fx.Node], start: int, end: int) -> int:
    """Where all levels that begin from `start` on have ended, at `end` at the earliest."""
    depth = 0
    for place in range(start, len(nodes)):
        depth += (nodes[place].target in _BEGINS) - (nodes[place].target in _ENDS)
        if depth == 0 and place + 1 >= end:
            return place + 1
    return len(nodes)


def _without_gradients(region: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that compute floating tensors under `no_grad`, as a region itself says."""
    is_on, found = True, set[fx.Node]()
    for node in region:
        if node.target is torch._C._set_grad_enabled:
            is_on = bool(node.args[0])
        value = node.meta.get("example_value")
        if not is_on and takes_gradient(value):
            found.add(node)
    return found


def _write_out(
    gm: fx.GraphModule, region: Sequence[fx.Node], graph: fx.Graph, copies: dict[fx.Node, fx.Node], fake_mode: Any
) -> None:
    """Append to `graph` what the nodes of `region` compute, and note in `copies` what later nodes read.

    Raises:
        CaptureFailed: derivatives in forward mode, of which a trace keeps nothing.
    """
    if any(node.target is FORWARD_LEVEL for node in region):
        where, legal = next(filter(None, map(source_of, region)), None), "torch.func.grad, vjp or jacrev"
        raise CaptureFailed("torch.func.jvp: derivatives in forward mode", where=where, legal=legal)
    inside = set(region)
    operands = list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]
    child = fx.Graph()
    own = {node: child.placeholder(node.name) for node in operands}
    quiet = _without_gradients(region)
    detached = dict[fx.Node, fx.Node]()  # what a trace below the dispatcher would not tell
    for node in region:
        seen = own if node in quiet else own | detached
        own[node] = child.node_copy(node, seen.__getitem__)
        if node in quiet and any(user not in quiet for user in node.users):
            detached[node] = child.call_method("detach", (own[node],))
    child.output([detached.get(node, own[node]) for node in results])
    table: Any = get_decompositions(_DERIVATIVES)
    run = fx.Interpreter(fx.GraphModule(gm, child)).run
    with fake_mode, torch.enable_grad(), fx.traceback.preserve_node_meta():
        examples = [fake_like(node.meta["example_value"]) for node in operands]
        traced = make_fx(run, decomposition_table=table)(*examples)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), (copies[node] for node in operands), strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            setattr(gm, f"{node.target}_of_{region[0].name}", getattr(traced, str(node.target)))
            values[node] = graph.get_attr(f"{node.target}_of_{region[0].name}")
            continue
        if node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
    (output,) = traced.graph.find_nodes(op="output")
    copies.update(zip(results, fx.map_arg(output.args[0], values.__getitem__), strict=True))
