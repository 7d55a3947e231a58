"""`tensor.register_hook` in a forward: a custom function whose forward does nothing and whose backward is the hook.

A hook sees the whole gradient of its tensor, also what comes from readers before it was registered. So all of them read
what the function gives. Of several hooks of a tensor the first sees the gradient first: its function is the last one.
"""

from __future__ import annotations

import operator

import torch.fx as fx

from spcompile.capture.custom_functions import APPLY
from spcompile.diagnostics import CaptureFailed, source_of

_HOOK = "register_hook"  # of torch.ops.higher_order; torch 2.11 has none


def hooks_as_functions(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm` with such functions in place of hooks, also in the graphs inside of it; itself where there are none.

    Raises:
        CaptureFailed: a hook reads what is computed behind other readers of its tensor.
    """
    if not any(
        _is_hook(node) for part in gm.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes
    ):
        return gm
    found = fx.GraphModule(gm, fx.Graph())
    result = found.graph.graph_copy(gm.graph, {})
    found.graph.output(result).meta = dict(gm.graph.output_node().meta)
    for node in found.graph.find_nodes(op="get_attr"):
        part = getattr(gm, str(node.target))
        setattr(found, str(node.target), hooks_as_functions(part) if isinstance(part, fx.GraphModule) else part)
    last = dict[fx.Node, fx.Node]()
    for number, node in enumerate(filter(_is_hook, list(found.graph.nodes))):
        _replace(found, node, number, last)
    found.recompile()
    return found


def _is_hook(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) == _HOOK


def _replace(gm: fx.GraphModule, node: fx.Node, number: int, last: dict[fx.Node, fx.Node]) -> None:
    """node: `hook(tensor, body, *operands)`. last: what tensors are behind the functions of their hooks so far."""
    graph, (tensor, body, *operands) = gm.graph, node.args
    assert isinstance(tensor, fx.Node)
    assert isinstance(body, fx.Node)
    hook: fx.GraphModule = getattr(gm, str(body.target))
    order = {each: place for place, each in enumerate(graph.nodes)}
    earlier = [user for user in tensor.users if order[user] < order[node]]
    before = _first_place(node, tensor, earlier) if not operands else node
    node.replace_all_uses_with(last.get(tensor, tensor))
    if hook.graph.output_node().args[0] is None:  # a hook that changes nothing
        graph.erase_node(node)
        return
    readers = [user for user in tensor.users if not _is_hook(user) and order[user] >= order[before]]
    if operands and earlier:
        legal = "a hook that reads nothing from outside, or that is registered where its tensor is computed"
        raise CaptureFailed("a hook of a gradient that earlier readers add to", where=source_of(node), legal=legal)
    names = (f"hooked_{number}", f"hook_of_{number}")
    for name, part in zip(names, _as_function(hook, len(operands)), strict=True):
        setattr(gm, name, part)
    with graph.inserting_before(before):
        site = graph.call_function(APPLY, (*map(graph.get_attr, names), tensor, *operands))
        value = graph.call_function(operator.getitem, (site, 0))
    site.meta, value.meta = dict(node.meta), dict(node.meta)
    for user in readers:
        user.replace_input_with(tensor, value)
    last.setdefault(tensor, value)
    graph.erase_node(node)


def _first_place(node: fx.Node, tensor: fx.Node, earlier: list[fx.Node]) -> fx.Node:
    """Before what a hook's function may stand: behind its tensor, all inputs, and what has written to the tensor."""
    writes = [user for user in earlier if user.op == "call_method" and str(user.target).endswith("_")]
    last = max(writes, key=list(node.graph.nodes).index) if writes else tensor
    place = last.next
    while place.op == "placeholder":
        place = place.next
    return place


def _as_function(body: fx.GraphModule, count: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(forward, backward) of a custom function that gives its operand on, and saves `count` others for the hook."""
    forward = fx.Graph()
    given, *saved = [forward.placeholder(f"operand_{i}") for i in range(1 + count)]
    forward.output(((given,), saved))
    backward = fx.Graph()
    result = backward.graph_copy(body.graph, copies := dict[fx.Node, fx.Node]())
    for old, new in copies.items():
        new.meta = dict(old.meta)
    backward.output((result, *[None] * count))
    return fx.GraphModule({}, forward), fx.GraphModule(body, backward)
