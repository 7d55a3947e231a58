"""Drops terms that are 0 and were there to create a gradient, once autograd has made it.

A custom function of the user's is its value + J(x - x.detach()) in a captured graph. Behind autograd the second term
gives nothing but work.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.capture.custom_functions import NO_CHANGE
from spcompile.graph.linear import linear_in

aten = torch.ops.aten


def drop_zero_terms(graph: fx.Graph) -> int:
    """On a joint graph, in place; returns how many sums lost a term."""
    changes = [node for node in graph.nodes if _is_no_change(node)]
    if not changes:
        return 0
    zero, dropped = linear_in(graph, changes), 0
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        kept = [term for term in node.all_input_nodes if term not in zero]
        is_sum = len(node.all_input_nodes) == 2 and not node.kwargs  # alpha would scale what is kept
        if is_sum and len(kept) == 1 and _like_of(kept[0]) == _like_of(node):
            node.replace_all_uses_with(kept[0])
            dropped += 1
    graph.eliminate_dead_code()
    return dropped


def _is_no_change(node: fx.Node) -> bool:
    return node.target is aten.sub.Tensor and NO_CHANGE in node.meta.get("custom", {})


def _like_of(node: fx.Node) -> tuple[object, ...]:
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype
