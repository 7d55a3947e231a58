"""Saved values that wait in the memory of the host: forward and backward get their copies there and back.

Before   return (loss, h)                                  def backward(h, ...): ... mm(h, ...)
After    to_host = spx.to_host(h)                          def backward(h, ...):                  # h: on the host
         wait_copy = spx.wait_copy(to_host, h)                 to_device = spx.to_device(h, device)
         return (loss, wait_copy)                              wait_copy = spx.wait_copy(to_device, h)

A copy to the host is waited for at the end, one back where it is read. `place-host-copies` puts them where they hide.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.fx as fx

from spcompile.collectives.host_copy import TO_DEVICE, TO_HOST, WAIT_COPY
from spcompile.graph.edit import call
from spcompile.graph.storage import root_of, saved_pairs


def send_to_host(forward: fx.GraphModule, backward: fx.GraphModule, names: Collection[str]) -> int:
    """Copy these values of the forward, by name, to the host and back; returns how many."""
    pairs = [(value, taken) for value, taken in saved_pairs(forward.graph, backward.graph) if value.name in names]
    for value, taken in pairs:
        readers, device = list(taken.users), taken.meta["val"].device
        _make_early(value)
        output = forward.graph.output_node()
        on_host = _arrived(value, _new_copy_node(value.next, TO_HOST.op, value, like=value), before=output)
        output.replace_input_with(value, on_host)
        taken.meta["val"] = on_host.meta["val"]
        first = min(readers)
        back = _arrived(taken, _new_copy_node(first, TO_DEVICE.op, taken, device, like=first), before=first)
        for reader in readers:
            reader.replace_input_with(taken, back)
    for gm in (forward, backward):
        gm.recompile()
    return len(pairs)


def _make_early(value: fx.Node) -> None:
    """Autograd makes views to be saved at the end; a copy may start where the storage is made."""
    views, root = [value], root_of(value)
    while views[-1] is not root:
        views.append(views[-1].all_input_nodes[0])
    if all(len(view.all_input_nodes) == 1 for view in views[:-1]):
        for view in views[:-1]:
            root.append(view)


def _new_copy_node(before: fx.Node, target: Any, *args: Any, like: fx.Node) -> fx.Node:
    node = call(before.graph, target, args, like=like, before=before)
    node.meta.setdefault("spx_origin", "memory")
    return node


def _arrived(source: fx.Node, start: fx.Node, before: fx.Node) -> fx.Node:
    """The wait for a copy."""
    return _new_copy_node(before, WAIT_COPY, start, source, like=start)
