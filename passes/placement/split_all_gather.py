"""split-all-gather: an AllGather of one dim = AllToAll to another dim, then AllGather along that one.

Before: reshard(x, tp, S(a), I). After: reshard(reshard(x, tp, S(a), S(b)), tp, S(b), I), and the AllGather moves below
what b passes. What needs features whole, such as a norm of all heads, runs on rows of the sequence; what needs the
sequence whole, such as a Fourier transform along it, on features. That is done only where what then runs on parts is
worth more than what is sent. Entries of the batch never take a place: how many there are differs from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.aten_ops import overloads
from spcompile.graph.edit import is_getitem, result_number
from spcompile.graph.reshard import Place, Reshard, is_reshard, parse_place
from spcompile.graph.sizes import hint
from spcompile.graph.storage import root_of
from spcompile.passes.placement.sink_all_gather import passes_at, sink_all
from spcompile.passes_api import Context, Example, RewritePass, Stage
from spcompile.sharding.exchanges import WORK
from spcompile.sharding.global_view import is_view
from spcompile.sharding.layout import layout_of
from spcompile.sharding.propagate import Choice, place_of
from spcompile.sharding.resharding import families_of_sequences, reshard_to, reshards_of
from spcompile.sharding.sharded_or_replicated import WIRE, estimated_bytes
from spcompile.sharding.spaces import Space, leaves

_MOVES = frozenset(
    overloads(
        "cat clone constant_pad_nd embedding flip gather index.Tensor index_add index_put index_select pad repeat roll "
        "scatter.src scatter_add stack"
    )
)


@dataclass(frozen=True)
class SplitAllGather(RewritePass):
    """Split every AllGather behind which enough runs over another dim."""

    name: ClassVar[str] = "split-all-gather"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"sink-all-gather"})
    summary: ClassVar[str] = (
        "splits AllGather into AllToAll to another dim and AllGather along it, where that splits work"
    )
    axis: ClassVar[str | None] = "tp"

    def rewrites(self, gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        """Split one after the other, until none is left that is worth it."""
        entries, degree = _entries_of_inputs(gm.graph), ctx.mesh.size("tp")
        is_split = True
        while is_split:
            is_split = False
            for gather in reshards_of(gm.graph, "tp", "S", "I"):
                place = _best_place(gather, entries, degree)
                if place is not None:
                    is_split = True
                    yield _gather_along(gather, str(place), self.name)


def _gather_along(gather: fx.Node, state: str, origin: str) -> fx.Node:
    """Give those who read a value whole the AllGather of another split of it, which moves down; returns that split.

    What makes parts of the whole, or gathers for split weights, stays with the first AllGather.
    """
    change = Reshard.of(gather)
    part = reshard_to(change.x, "tp", change.src, state, origin=origin)
    whole = reshard_to(part, "tp", state, "I", origin=origin)
    for user in [user for user in gather.users if not is_reshard(user)]:
        user.replace_input_with(gather, whole)
    if not gather.users:
        gather.graph.erase_node(gather)
    sink_all(whole, origin)
    return part


def _best_place(gather: fx.Node, entries: set[Space], degree: int) -> Place | None:
    """The other place at which most is won; None if nothing is."""
    if is_view(Reshard.of(gather).x, "tp"):
        return None
    worth = {place: _worth(gather, place, degree) for place in _other_places(Reshard.of(gather), entries, degree)}
    best = max(worth, key=lambda place: worth[place], default=None)
    return best if best is not None and worth[best] > 0 else None


def _entries_of_inputs(graph: fx.Graph) -> set[Space]:
    """What the first dims of the user's inputs run over first, where those have more dims and it is no sequence."""
    layouts = [layout_of(n) for n in graph.find_nodes(op="placeholder") if not n.meta.get("state")]
    dims = (layout.dims[0] for layout in layouts if layout is not None and len(layout.dims[0]) > 1)
    return {leaves(of_first)[0].family() for of_first, *_ in dims if of_first} - families_of_sequences(graph)


def _other_places(change: Reshard, entries: set[Space], degree: int) -> list[Place]:
    """The dims over which a value could be split in place of the one over which it is."""
    layout, now = layout_of(change.x), parse_place(change.src)
    assert layout is not None
    firsts = ((Place(dim), leaves(spaces)[0]) for dim, spaces in enumerate(layout.dims[0]) if spaces)
    return [p for p, s in firsts if p != now and hint(s.size) >= degree and s.family() not in entries]


def _worth(gather: fx.Node, place: Place, degree: int) -> float:
    """By how much what can run on parts is worth more than what is sent: AllToAlls, and AllGathers of all it gives.

    To give elements another place is no work. A part that is cut out of a gathered value, or a gather for products with
    split weights, costs what it does anyway, forward and backward.
    """
    places = {gather: place}
    pending, work, sent = [gather], 0.0, estimated_bytes(gather) * (2 / degree - 1)
    while pending:
        value = pending.pop()
        is_whole = False
        for user in value.users:
            if is_reshard(user):
                is_whole = is_whole or (value is gather and Reshard.of(user).dst == "R")
                continue
            choice = passes_at(user, value, places[value])
            is_whole = is_whole or choice is None
            if choice is None or user in places:
                continue
            work += estimated_bytes(user) if _computes(user) else 0.0
            found = dict(_places_of_results(user, choice))
            places |= found
            pending += found
        sent += estimated_bytes(value) if is_whole else 0.0
    return WORK * work * (1 - 1 / degree) - WIRE * sent if work else 0.0


def _computes(node: fx.Node) -> bool:
    return root_of(node) is node and node.target not in _MOVES


def _places_of_results(user: fx.Node, choice: Choice) -> Iterator[tuple[fx.Node, Place]]:
    """Where a call that runs on parts puts each of its results that is split."""
    layout = layout_of(user)
    assert layout is not None
    assert layout.call is not None
    results = [user] if isinstance(user.meta["val"], Tensor) else [n for n in user.users if is_getitem(n)]
    for value in results:
        number = 0 if value is user else result_number(value)
        place = place_of(layout.call.rule.results[number], layout.call, choice)
        if place is not None:
            yield value, place


def _norm_of_all_heads(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, up_DF: Tensor) -> Tensor:
    y_BNSH = torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH)
    y_BSD = y_BNSH.transpose(1, 2).flatten(2)
    return torch.nn.functional.layer_norm(y_BSD, (y_BSD.shape[-1],)) @ up_DF


def _inputs() -> tuple[Tensor, ...]:
    shapes = (*((2, 2, 7, 4),) * 3, (8, 4))
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)


EXAMPLE = Example(_norm_of_all_heads, _inputs, mesh=(("tp", 2),))
