"""Ranges with names of layers in profiles of graphs that run call by call: `spcompile::ring_attention/blocks.3`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.axes import axis_argument
from spcompile.graph.printer import op_name
from spcompile.schedule.communication import module_path_of
from spcompile.schedule.timeline import is_wait


def labels_of(graph: fx.Graph) -> dict[fx.Node, str]:
    """By node: the name of its range. Collectives, rings and waits have one; a wait that of what it waits for."""
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        about = node.all_input_nodes[0] if is_wait(node) and node.all_input_nodes else node
        if axis_argument(about.target) is not None:
            found[node] = range_name(about, waits=about is not node)
    return found


def range_name(node: fx.Node, waits: bool = False) -> str:
    """Of a call that communicates, or of what waits for it."""
    op = op_name(node).rpartition(".")[2]
    path = module_path_of(node)
    return f"spcompile::{'wait for ' if waits else ''}{op}{'/' if path else ''}{path}"


class _Ranged(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, labels: Mapping[fx.Node, str]) -> None:
        super().__init__(gm)
        self._labels = labels

    def run_node(self, n: fx.Node) -> Any:
        label = self._labels.get(n)
        if label is None:
            return super().run_node(n)
        with torch.profiler.record_function(label):
            return super().run_node(n)


def interpreter(gm: fx.GraphModule, labels: Mapping[fx.Node, str], unread: Iterable[fx.Node] = ()) -> fx.Interpreter:
    """Runs a graph; with ranges while a profiler looks, else as it is.

    unread: what has no reader, which torch keeps to the end, and all that it views. It is dropped at once.
    """
    is_profiled = bool(labels) and torch.autograd._profiler_enabled()
    runs = _Ranged(gm, labels) if is_profiled else fx.Interpreter(gm)
    for node in unread:
        runs.user_to_last_uses.setdefault(node, []).append(node)
    return runs
