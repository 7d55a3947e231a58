"""How long compute would wait for each collective of a graph in which every collective is still one node.

On a copy, each becomes a start and a wait without the views around them, and the copy is put into the order that
overlap-collectives would find. So a rewrite can tell what is exposed from what is hidden already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from spcompile.collectives import call_arguments
from spcompile.graph.edit import copy_graph
from spcompile.schedule.list_schedule import ListScheduler
from spcompile.schedule.op_cost import CostModel
from spcompile.schedule.timeline import RunRecord, timeline

_spx, _c10d = torch.ops.spx, torch.ops._c10d_functional
# spx op -> (functional op, its arguments behind the operand)
_STARTS: dict[Any, tuple[Any, Callable[[str, int], tuple[Any, ...]]]] = {
    _spx.all_gather.default: (_c10d.all_gather_into_tensor.default, lambda axis, degree: (degree, axis)),
    _spx.reduce_scatter.default: (_c10d.reduce_scatter_tensor.default, lambda axis, degree: ("sum", degree, axis)),
    _spx.all_reduce.default: (_c10d.all_reduce.default, lambda axis, degree: ("sum", axis)),
}


def exposed_seconds(graph: fx.Graph, cost: CostModel, budget: float, ahead: float) -> dict[str, float]:
    """Name of a collective -> the seconds for which compute waits for it.

    budget, ahead: as of ListScheduler.
    """
    copy = copy_graph(graph)
    starts: dict[fx.Node, str] = {}
    for node in list(copy.nodes):
        if node.target in _STARTS:
            starts[_in_two(node)] = node.name
    cost = cost.of_one_graph()
    record = RunRecord()
    timeline("", ListScheduler(copy, cost, budget, ahead).run(), cost, record)
    return {name: record.late_by.get(start, 0.0) for start, name in starts.items()}


def _in_two(node: fx.Node) -> fx.Node:
    """Start and wait in place of a collective; returns the start."""
    assert isinstance(node.target, torch._ops.OpOverload)
    target, arguments = _STARTS[node.target]
    operand, named = call_arguments(node.target, node.args, node.kwargs)
    with node.graph.inserting_before(node):
        start = node.graph.call_function(target, (operand, *arguments(named["axis"], named["degree"])))
        wait = node.graph.call_function(_c10d.wait_tensor.default, (start,))
    start.meta["val"] = wait.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(wait)
    node.graph.erase_node(node)
    return start
