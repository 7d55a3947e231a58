"""`spx::all_gather_into_tensor`: a gather on gloo of which several may be in flight.

torch 2.13 keeps the name of a group's last finished work in one string, which both of gloo's threads assign without a
lock (`ProcessGroupGloo::runLoop`). A name of 16 letters or more lies on the heap: two such works that end at once free
it twice, and the process dies somewhere later. Functional all-gathers are named ALLGATHER_COALESCED; two in flight
crashed within some thousand calls of plain torch. Those into a tensor that is there are named ALLGATHER, and no other
collective that spcompile starts has a long name either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.collectives.collective import _LIBRARY, STARTS, rank_in

_c10d = torch.ops._c10d_functional
_LIBRARY.define(
    "all_gather_into_tensor(Tensor input, int group_size, str group_name) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _all_gather_into_tensor(input: Tensor, group_size: int, group_name: str) -> Tensor:
    """Sends from the result, not from the operand, whose memory Inductor may give away before the wait."""
    result = _fake(input, group_size, group_name)
    own = result.tensor_split(group_size)[rank_in(group_name)]
    own.copy_(input)
    return _c10d.all_gather_into_tensor_out.default(own, group_size, group_name, out=result)


@torch.library.register_fake("spx::all_gather_into_tensor", lib=_LIBRARY)
def _fake(input: Tensor, group_size: int, group_name: str) -> Any:
    return input.new_empty([group_size * input.shape[0], *input.shape[1:]])


_LIBRARY.impl("all_gather_into_tensor", _all_gather_into_tensor, "CompositeExplicitAutograd")
GATHER_ON_GLOO = torch.ops.spx.all_gather_into_tensor.default
STARTS.add(GATHER_ON_GLOO)


def gather_start(x: Tensor) -> torch._ops.OpOverload:
    """The op that starts a gather of x at once, outside of graphs."""
    return GATHER_ON_GLOO if x.device.type == "cpu" else _c10d.all_gather_into_tensor.default


def gathers_on_gloo(graph: fx.Graph) -> int:
    """Replace functional all-gathers in a graph that is about to run on gloo; returns how many."""
    gathers = graph.find_nodes(op="call_function", target=_c10d.all_gather_into_tensor.default)
    for node in gathers:
        node.target = GATHER_ON_GLOO
    return len(gathers)
