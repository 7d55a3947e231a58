"""sink-all-reduce: partial sums are completed where they are smallest.

Before: reshard(x, tp, P, I) right behind the product that leaves parts of a sum. After: the ops behind it that are
linear run on the parts, and their result is completed: the weighted sum of a mixture's experts instead of every
expert's rows, the sum of parallel branches instead of each. Where to complete is a minimum cut over bytes.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.dtypes import takes_gradient
from spcompile.graph.linear import is_zero, linear_groups
from spcompile.graph.reshard import Reshard, is_reshard
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.global_view import is_view
from spcompile.sharding.layout import layout_of, show
from spcompile.sharding.resharding import families_of_sequences, reshard_to, reshards_of, state_of
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.sharded_or_replicated import estimated_bytes, trained_values
from spcompile.sharding.spaces import Space

_A_LITTLE = 2.0**-10  # decides between two places that cost the same


@dataclass(frozen=True)
class SinkAllReduce(Pass):
    """Let AllReduces of `tp` pass linear ops, where that saves bytes."""

    name: ClassVar[str] = "sink-all-reduce"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"insert-tensor-reshards"})
    summary: ClassVar[str] = "moves AllReduces below linear ops to where their value is smallest"
    axis: ClassVar[str | None] = "tp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Returns how many ops were passed."""
        sums = {node: Reshard.of(node).x for node in reshards_of(gm.graph, "tp", "P", "I")}
        groups = _linear_ops(gm.graph, sums)
        passed = _worth_passing(gm.graph, sums, groups)
        for node in (n for n in gm.graph.nodes if n in passed):
            _run_on_parts(node, groups[node], sums, self.name)
        for node in passed:
            if any(user not in passed for user in node.users):
                _complete(node, passed, self.name)
        for node in sums:
            if not node.users:
                gm.graph.erase_node(node)
        return len(passed)


def _linear_ops(graph: fx.Graph, sums: dict[fx.Node, fx.Node]) -> dict[fx.Node, frozenset[int]]:
    """The calls that may run on parts of sums, each with the operands that would be parts."""
    found: dict[fx.Node, frozenset[int]] = {}
    for node in graph.nodes:
        layout = layout_of(node)
        if node.op != "call_function" or is_reshard(node) or layout is None or "tp" in layout.choice:
            continue
        operands = tensor_operands(node)
        parts = {i for i, read in enumerate(operands) if read in sums or read in found}
        if not parts or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        whole = [read for i, read in enumerate(operands) if i not in parts]
        if any(is_view(read, "tp") or state_of(read, "tp") != "I" for read in whole):
            continue
        for group in linear_groups(node):
            if parts <= group and all(i in parts or is_zero(operands[i]) for i in group):
                found[node] = group
    return found


def _worth_passing(
    graph: fx.Graph, sums: dict[fx.Node, fx.Node], groups: dict[fx.Node, frozenset[int]]
) -> set[fx.Node]:
    """The calls on whose parts a sum is carried so that the fewest bytes are sent.

    On the source's side of the cut a value is in parts. Cut edges cost its bytes where somebody reads it whole, and the
    bytes of a fixed operand's gradient, which becomes a sum over ranks. Of two places that cost the same the earlier
    one: behind it every rank computes with its rows alone, and no residual stream is a sum that all ranks hold whole.
    But where a sequence is cut, as into text and image, ranks have rows of each part, so parts are completed.
    """
    gradient, sequences = trained_values(graph), families_of_sequences(graph)
    network = nx.DiGraph()
    network.add_nodes_from(("parts", "whole"))
    for value in [*sums, *groups]:
        if value in sums:
            network.add_edge("parts", value)
        is_cut = all(user in groups and _is_cut_of(user, sequences) for user in value.users)
        bytes_sent = estimated_bytes(value) * (1 + _A_LITTLE if is_cut else 1)
        network.add_edge(value, ("complete", value), capacity=bytes_sent)
        for user in value.users:
            network.add_edge(("complete", value), user if user in groups else "whole")
            if user in groups:
                network.add_edge(user, value)
    for node, group in groups.items():
        fixed = [read for i, read in enumerate(tensor_operands(node)) if i not in group and read in gradient]
        network.add_edge(node, "whole", capacity=float(sum(estimated_bytes(read) for read in fixed)))
    # networkx finds the minimum cut next to the sink: here the sink is where sums are made.
    _, (_, parts) = nx.minimum_cut(network.reverse(), "whole", "parts")
    return {node for node in groups if node in parts}


def _is_cut_of(node: fx.Node, sequences: Set[Space]) -> bool:
    """Whether a call takes a part of a sequence that is one itself."""
    layout = layout_of(node)
    if layout is None or layout.call is None or layout.call.rule.moving is None:
        return False
    operand = layout.call.rule.operands[0]
    cut = [f for dim in operand for f in dim if f in layout.call.rule.replicated]
    return any(not sequences.isdisjoint(s.family() for s in layout.call.leaves_of(f)) for f in cut)


def _run_on_parts(node: fx.Node, group: frozenset[int], sums: dict[fx.Node, fx.Node], origin: str) -> None:
    """Let a linear call read parts of sums. Fixed operands are used differently by each rank."""
    numbers = iter(range(len(tensor_operands(node))))

    def given(read: fx.Node) -> fx.Node:
        if not tensor_results(read) or not isinstance(read.meta.get("val"), torch.Tensor):
            return read
        if next(numbers) in group:
            return sums.get(read, read)
        return reshard_to(read, "tp", "I", "R", origin=origin) if takes_gradient(read.meta["val"]) else read

    node.args = fx.node.map_arg(node.args, given)
    node.kwargs = fx.node.map_arg(node.kwargs, given)
    layout = layout_of(node)
    assert layout is not None
    layout.partial.add("tp")
    show(node, "tp", "P")


def _complete(node: fx.Node, passed: set[fx.Node], origin: str) -> None:
    """Give those who read a sum whole its AllReduce."""
    users = [user for user in node.users if user not in passed]
    whole = reshard_to(node, "tp", "P", "I", origin=origin)
    for user in users:
        user.replace_input_with(node, whole)


def _mixture(x_BSD: Tensor, gate_DK: Tensor, up_KDF: Tensor, down_KFD: Tensor) -> Tensor:
    h_B1SD = x_BSD.unsqueeze(1)
    y_B1SD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD)
    weight_B1SK = (y_B1SD @ gate_DK).softmax(-1)
    z_BKSD = torch.nn.functional.gelu(y_B1SD @ up_KDF) @ down_KFD
    return x_BSD + (z_BKSD * weight_B1SK.transpose(1, 3)).sum(1)


def _inputs() -> tuple[Tensor, ...]:
    shapes = ((2, 7, 4), (4, 3), (3, 4, 6), (3, 6, 4))
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)


EXAMPLE = Example(_mixture, _inputs, mesh=(("tp", 2),))
