"""Which calls run sharded and which replicated: a minimum cut over bytes.

Every call that may run sharded is a node of a flow network; on the source's side it runs sharded. Cut edges cost
    a gather   where a sharded call's value is needed whole               (bytes over the wire, weight WIRE)
    a copy     where a call runs replicated: every rank repeats its work  (bytes of the results, weight 1)
    a move     where a call runs sharded that sends elements elsewhere    (bytes that it sends, weight WIRE)
    a slice    where a replicated call's value is taken in parts          (free forward; a gather backward)
Calls on the path of a gradient always run sharded if they may: repeating them is never cheaper. So the cut decides
over masks, positions and labels only, and stays small. On other axes every choice stands: on `tp` it was made for
its weights, on `dp` inputs come in parts and a gather is never cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.edit import is_getitem, operand
from spcompile.graph.reshard import Place
from spcompile.graph.sizes import hint, numel_hint
from spcompile.sharding.layout import NodeLayout, layout_of
from spcompile.sharding.propagate import Choice, place_of
from spcompile.sharding.rules.rule import tensor_results

WIRE = 4.0  # one byte over a link against one byte of memory traffic


@dataclass(frozen=True)
class Use:
    """One operand slot: `user` reads `value`; sharded, it wants it at `place` (None: whole).

    unread: only its shape and dtype matter, so any state will do.
    """

    value: fx.Node
    user: fx.Node
    place: Place | None
    unread: bool = False


def uses_of(user: fx.Node, axis: str) -> list[Use]:
    """The tensor operands of a call and where its choice on `axis` wants each of them."""
    layout = layout_of(user)
    choice = layout.choice.get(axis) if layout else None
    operands = tensor_operands(user)
    if layout is None or layout.call is None:
        return [Use(read, user, None) for read in operands]
    call = layout.call
    places = [place_of(dims, call, choice) if choice is not None else None for dims in call.rule.operands]
    return [Use(o, user, p, i in call.rule.unread) for i, (o, p) in enumerate(zip(operands, places, strict=True))]


def estimated_bytes(node: fx.Node) -> float:
    """Estimated bytes of all tensor results."""
    return float(sum(numel_hint(v) * v.element_size() for v in tensor_results(node)))


def trained_values(graph: fx.Graph) -> set[fx.Node]:
    """The floating values that depend on an input that requires a gradient."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        floating = any(map(takes_gradient, tensor_results(node)))
        if node.op == "placeholder":
            carries = floating and bool(node.meta.get("trainable"))
        else:
            cuts = node.target is torch.ops.aten.detach.default
            carries = floating and not cuts and any(i in found for i in node.all_input_nodes)
        if carries:
            found.add(node)
    return found


def sharded_calls(graph: fx.Graph, axis: str) -> set[fx.Node]:
    """The calls that shall run sharded on `axis`, out of those that chose a factor."""
    gradient = trained_values(graph)
    candidates = [n for n in graph.nodes if (layout := layout_of(n)) is not None and axis in layout.choice]
    forced = {n for n in candidates if axis != "cp" or n in gradient or _must(layout_of(n))}
    network = nx.DiGraph()
    network.add_nodes_from(("sharded", "replicated"))
    for node in candidates:
        capacity = {} if node in forced else {"capacity": estimated_bytes(node) + 1.0}
        network.add_edge("sharded", node, **capacity)
        if sent := _bytes_moved(node):
            network.add_edge(node, ("moved", node), capacity=WIRE * sent)
            network.add_edge(("moved", node), "replicated")
    for node in graph.nodes:
        for use in uses_of(node, axis):
            _add_use(network, use, axis, gradient)
    _, (sharded, _) = nx.minimum_cut(network, "sharded", "replicated")
    return {n for n in candidates if n in sharded}


def _must(layout: NodeLayout | None) -> bool:
    return layout is not None and (layout.forced or (layout.call is not None and bool(layout.call.rule.paired)))


def _bytes_moved(node: fx.Node) -> float:
    """What ranks send each other where a call runs sharded: all that it gives, or of running sums the last ones."""
    layout = layout_of(node)
    if layout is None or layout.call is None:
        return 0.0
    rule, chosen = layout.call.rule, {choice.factor for choice in layout.choice.values()}
    for factor in chosen & rule.summed_up:
        return estimated_bytes(node) / hint(rule.sizes[factor])
    return estimated_bytes(node) if rule.moves or chosen & {*rule.windows, *rule.mirrored} else 0.0


def _chosen(node: fx.Node, axis: str) -> Choice | None:
    layout = layout_of(node)
    return layout.choice.get(axis) if layout is not None else None


def _add_use(network: nx.DiGraph, use: Use, axis: str, gradient: set[fx.Node]) -> None:
    """Edges for one operand slot. A call that cannot run sharded stands on the replicated side."""
    if use.unread:
        return
    producer = operand(use.value, 0) if is_getitem(use.value) else use.value
    layout = layout_of(use.value)
    made = layout.place(axis) if layout is not None and _chosen(producer, axis) is not None else None
    user = use.user if _chosen(use.user, axis) is not None else "replicated"
    if made is not None:
        whole = ("whole", use.value)
        network.add_edge(producer, whole, capacity=WIRE * estimated_bytes(use.value) + 1.0)
        network.add_edge(whole, user if use.place == made else "replicated")
    if use.place is not None and user != "replicated":
        back = WIRE * estimated_bytes(use.value) if use.value in gradient else 0.0
        network.add_edge(user, producer if made is not None else "replicated", capacity=back + 0.5)
