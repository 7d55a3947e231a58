"""What the backward makes again instead of saving it: tags on the joint graph, which the partitioner obeys.

A gathered activation is gathered again from its shard (Korthikanti et al. 2022, arXiv 2205.05198), as are neighbours'
rows; an all-to-all with `recompute` is made again, padding is masked again, and a rank's part of a weight is cut out
again. The partitioner alone would save what follows: it never repeats a copy that the backward must have in memory
(torch 2.13: torch/_functorch/partitioners.py, `is_materialized_backwards`), so a reshaped copy of the gathered tensor
would be kept where the gathered tensor itself may not be. Hence whatever only moves elements, next to such an op, is
tagged with it: behind it up to the first ops that compute, before it back to those that did.
"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

import spcompile.collectives  # noqa: F401  (defines the ops)
from spcompile.collectives.typed_calls import AllToAllCall, ShardCall
from spcompile.graph.edit import operand
from spcompile.graph.sizes import numel_hint

aten = torch.ops.aten
spx = torch.ops.spx

_VIEWS = {
    aten.alias,
    aten.as_strided,
    aten.detach,
    aten.expand,
    aten.permute,
    aten.select,
    aten.slice,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
}
_COPIES = {
    aten._unsafe_view,
    aten.cat,
    aten.clone,
    aten.constant_pad_nd,
    aten.flip,
    aten.index,
    aten.index_select,
    aten.repeat,
    aten.reshape,
    spx.mask_padding,
}


def tag_recomputed(graph: fx.Graph, regather: bool = True) -> int:
    """Tag MUST_RECOMPUTE what the backward has to make again; returns how many ops of the namespace spx that are.

    regather: False leaves gathered activations to the partitioner, which saves what the backward reads of them.

    No `ac_graph_id` is set: beside a checkpointed region of higher number the partitioner would save the value after
    all (torch 2.13: `cleanup_recompute_tags`).
    """
    found = [node for node in graph.nodes if _is_recomputed(node, regather)]
    for node in found:
        for move in (node, *_moves_after(node), *_moves_before(node)):
            move.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return len(found)


def _is_recomputed(node: fx.Node, regather: bool) -> bool:
    if node.target in (spx.all_gather.default, spx.halo.default):
        return regather
    if node.target is spx.mask_padding.default:
        return True
    if ShardCall.is_call(node):
        return _is_input(ShardCall.of(node).x)
    return AllToAllCall.is_call(node) and AllToAllCall.of(node).recompute


def _is_input(node: fx.Node) -> bool:
    """Whether a value is nothing but the elements of an input, such as a weight: a part of it is cut out again."""
    while (sources := _sources(node)) and len(sources) == 1:
        node = sources[0]
    return node.op == "placeholder"


def _moves_after(node: fx.Node) -> dict[fx.Node, None]:
    """All that is nothing but the elements of `node`, in another shape or order."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        moved = pending.pop()
        new = [user for user in moved.users if moved in _sources(user) and user not in found]
        found.update(dict.fromkeys(new))
        pending += new
    return found


def _moves_before(node: fx.Node) -> dict[fx.Node, None]:
    """What made the operand of `node` without computing; copies of a part may be saved, being less than the whole."""
    found: dict[fx.Node, None] = {}
    pending = [operand(node, 0)]
    while pending:
        move = pending.pop()
        sources = _sources(move)
        if sources and move not in found and (_packet(move) in _VIEWS or not _shrinks(move, sources)):
            found[move] = None
            pending += sources
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements `node` moves; none if it does more than that."""
    if _packet(node) not in _VIEWS | _COPIES:
        return []
    first = node.args[0]
    return [x for x in (first if isinstance(first, (list, tuple)) else [first]) if isinstance(x, fx.Node)]


def _shrinks(node: fx.Node, sources: list[fx.Node]) -> bool:
    size = numel_hint(node.meta["val"])
    return any(numel_hint(source.meta["val"]) > size for source in sources)


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)
