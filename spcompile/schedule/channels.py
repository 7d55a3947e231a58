"""What of a final graph has a group of its own along its axis, so that nothing else there has to wait for it.

A communicator does one thing after another. Were there one for each axis, the first hop of a ring would wait until a
bucket of gradients in front of it has been summed. So messages of ops with a loop inside (`messages`) and reductions
with whose results the graph does not compute (`gradients`) have one each. All others share the one that the mesh
brings along: gathers, scatters and exchanges of activations, which compute is about to read.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from spcompile.attention.ring.ring_call import ring_of
from spcompile.collectives.pipelined_matmuls import PIPELINED
from spcompile.machine.mesh import Channel
from spcompile.schedule.node_roles import renames
from spcompile.schedule.timeline import is_wait

_c10d = torch.ops._c10d_functional
_REDUCTIONS = (_c10d.all_reduce.default, _c10d.reduce_scatter_tensor.default)


def channels_of(graph: fx.Graph) -> dict[fx.Node, Channel]:
    """The channels of the nodes that have one; of the text of the graph alone, so that all ranks find the same."""
    found: dict[fx.Node, Channel] = {}
    for node in graph.nodes:
        if ring_of(node) is not None or node.target in PIPELINED:
            found[node] = "messages"
        elif node.target in _REDUCTIONS and _only_leaves(node):
            found[node] = "gradients"
    return found


def _only_leaves(start: fx.Node) -> bool:
    """Whether the result of a collective is moved out of the graph, and read by nothing else."""
    pending, seen = [start], set[fx.Node]()
    while pending:
        for user in pending.pop().users:
            if user.op == "output" or user in seen:
                continue
            if not (is_wait(user) or renames(user)):
                return False
            seen.add(user)
            pending.append(user)
    return True
