"""Makes Inductor keep the order that overlap-collectives found.

Inductor sorts twice (torch 2.13). Its memory pass looks for the order with the lowest peak; that is a setting. And a
fused kernel runs where its first part stood, so that a wait which only its last part reads is pulled up before products
that were to hide it; no setting helps. As Inductor's own overlap pass does, this one adds dependencies
(`control_deps`): while anything is on its way, products and waits depend on the product and the starts before them.
"""

from __future__ import annotations

import torch.fx as fx

from spcompile.collectives.host_copy import HOST_COPIES, WAIT_COPY
from spcompile.schedule.op_cost import is_matmul
from spcompile.schedule.timeline import is_wait, starts
from spcompile.torch_private import CustomGraphPass, OrderedSet, get_hash_for_files, preserve_node_ordering


class KeepOrder(CustomGraphPass):
    """A pass behind all others that Inductor makes on graphs, with an identity for its cache."""

    def __call__(self, graph: fx.Graph) -> None:
        preserve_node_ordering(graph, {node: OrderedSet(before) for node, before in dependencies(graph).items()})

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def dependencies(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Wait or product -> the product and the starts right before it, while anything is on its way."""
    flying: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    before: list[fx.Node] = []
    for node in graph.nodes:
        if starts(node) or node.target in HOST_COPIES:
            flying.add(node)
            before.append(node)
        elif is_wait(node) or node.target is WAIT_COPY or is_matmul(node):
            if before and flying:
                found[node] = [n for n in before if n not in node.all_input_nodes]
            flying.difference_update(node.all_input_nodes)
        if is_matmul(node):
            before = [node]
    return {node: others for node, others in found.items() if others}


# Handed over as config_patches, which also hold when the backward is compiled, at its first call.
KEEP_THE_ORDER: dict[str, object] = {
    "post_grad_custom_post_pass": KeepOrder(),
    "reorder_for_locality": False,
    "reorder_for_peak_memory": False,
    "reorder_for_compute_comm_overlap": False,
    "aten_distributed_optimizations.enable_overlap_scheduling": False,
}
