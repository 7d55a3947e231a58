"""On which mesh axis a node communicates, and the process groups that take the place of axes before a graph runs.

What a group sends waits for what it sent before. So messages of loops (rings, products in chunks) and sums of gradients
have groups of their own, beside that of all else along the axis: `cp/messages`, `cp/gradients` (`mesh.Channel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from spcompile.diagnostics import InvalidGraph, source_of
from spcompile.machine.mesh import Channel, on_channel


def axis_argument(target: Any) -> int | None:
    """Where in its schema an op names its mesh axis or process group; None for an op that does not communicate."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("spx", "_c10d_functional"):
        return None
    names = [argument.name for argument in target._schema.arguments]
    return next((names.index(name) for name in ("axis", "group_name") if name in names), None)


def bind_axes(graph: fx.Graph, groups: Mapping[str, str], channels: Mapping[fx.Node, Channel] | None = None) -> int:
    """Put c10d group names in place of mesh axes, in every op that communicates; returns how many nodes changed.

    The axis stays in meta["axis"], for printing and for the simulator. Binding twice changes nothing.
    groups: names of groups, by axis, or part of one, or a channel on it. channels: of nodes that have one of their own.

    Raises:
        InvalidGraph: an axis that `groups` does not have.
    """
    bound, channels = 0, channels or {}
    for node in graph.nodes:
        argument = axis_argument(node.target)
        if argument is None or "axis" in node.meta:
            continue
        axis = _argument(node, argument)
        name = on_channel(axis, channels.get(node))
        if name not in groups:
            raise InvalidGraph(
                f"{node.name} runs on axis {name!r}", where=source_of(node), legal=f"axes {', '.join(groups)}"
            )
        _set_argument(node, argument, groups[name])
        node.meta["axis"] = axis
        bound += 1
    return bound


def groups_of(graph: fx.Graph, channels: Mapping[fx.Node, Channel]) -> list[str]:
    """The axes, parts and channels on which an unbound graph communicates, sorted: all ranks have the same order."""
    places = [(node, axis_argument(node.target)) for node in graph.nodes if "axis" not in node.meta]
    found = [(str(_argument(node, place)), channels.get(node)) for node, place in places if place is not None]
    return sorted({on_channel(axis, channel) for axis, channel in found})


def _argument(node: fx.Node, index: int) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.args[index] if index < len(node.args) else node.kwargs[node.target._schema.arguments[index].name]


def _set_argument(node: fx.Node, index: int, value: str) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(node.target._schema.arguments[index].name, value)
