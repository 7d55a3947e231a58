"""What the backward makes again instead of saving it: tags on the joint graph, which the partitioner obeys.

A gathered activation is gathered again from its shard (Korthikanti et al. 2022, arXiv 2205.05198), as are neighbours'
rows; an all-to-all with `recompute` is made again, and one of what an attention gives, which is saved for its backward
anyway; padding is masked again, and a rank's part of a weight is cut out again. The partitioner alone would save what
follows: it never repeats a copy that the backward must have in memory (torch 2.13: torch/_functorch/partitioners.py,
`is_materialized_backwards`), so a reshaped copy of the gathered tensor would be kept where the gathered tensor itself
may not be. Hence whatever only moves elements, next to such an op, is tagged with it: behind it up to the first ops
that compute, before it back to those that did.

What is made of gathered activations element by element, or by a softmax, is as large as they are and whole on every
rank: it is made again too, behind its gather. A product is not, nor what draws random numbers.
"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

import spcompile.collectives  # noqa: F401  (defines the ops)
from spcompile.attention.ring.ring_call import is_attention
from spcompile.collectives.typed_calls import AllToAllCall, ShardCall
from spcompile.graph.aten_ops import packet_of
from spcompile.graph.edit import is_getitem, operand
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
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unbind,
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
_SOFTMAXES = {aten._softmax, aten._log_softmax}


def tag_recomputed(graph: fx.Graph, regather: bool = True) -> int:
    """Tag MUST_RECOMPUTE what the backward has to make again; returns how many ops of the namespace spx that are.

    regather: False leaves gathered activations to the partitioner, which saves what the backward reads of them.

    No `ac_graph_id` is set: beside a checkpointed region of higher number the partitioner would save the value after
    all (torch 2.13: `cleanup_recompute_tags`).
    """
    found = [node for node in graph.nodes if _is_recomputed(node, regather)]
    gathered: set[fx.Node] = set()
    for node in found:
        moved = {node, *_moves_after(node)}
        if node.target is spx.all_gather.default:
            gathered |= moved
        for move in (*moved, *_moves_before(node)):
            move.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    for node in _whole_of_gathered(graph, gathered):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    return len(found)


def _is_recomputed(node: fx.Node, regather: bool) -> bool:
    if node.target in (spx.all_gather.default, spx.halo.default):
        return regather
    if node.target is spx.mask_padding.default:
        return True
    if ShardCall.is_call(node):
        return _is_input(ShardCall.of(node).x)
    if AllToAllCall.is_call(node):
        return AllToAllCall.of(node).recompute or (regather and _is_of_attention(AllToAllCall.of(node).x))
    return False


def _is_of_attention(node: fx.Node) -> bool:
    """Whether a value is nothing but the elements that an attention gives."""
    while (sources := _sources(node)) and len(sources) == 1:
        node = sources[0]
    return is_getitem(node) and is_attention(operand(node, 0))


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


def _whole_of_gathered(graph: fx.Graph, gathered: set[fx.Node]) -> list[fx.Node]:
    """The calls of the forward that make something cheap, and as large, of what is gathered and of little else.

    What the graph returns is kept anyway. What else is read is saved in its place, so it must be an input or small.
    """
    gathered, found, late = {*gathered}, [], set[fx.Node]()
    for node in graph.nodes:
        read = node.all_input_nodes
        if "tangents" in str(node.target) or any(x in late for x in read):
            late.add(node)
            continue
        whole = [x for x in read if x in gathered]
        if (
            node in gathered
            or not whole
            or not all(isinstance(x.meta.get("val"), torch.Tensor) for x in (node, *whole))
        ):
            continue
        size = numel_hint(node.meta["val"])
        is_as_large = all(numel_hint(x.meta["val"]) <= size for x in whole)
        is_alone = all(x in gathered or x.op == "placeholder" or _is_small(x, size) for x in read)
        returned = any(user.op == "output" for user in node.users)
        if (_sources(node) or _is_cheap(node)) and is_as_large and is_alone and not returned:
            gathered.add(node)
            if "recompute" not in node.meta:
                found.append(node)
    return found


def _is_cheap(node: fx.Node) -> bool:
    """Whether a call computes elements from elements, or a softmax: bound by memory, and the same each time."""
    tags = getattr(node.target, "tags", ())
    is_elementwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return is_elementwise or packet_of(node) in _SOFTMAXES


def _is_small(node: fx.Node, than: int) -> bool:
    """Whether a value that is saved in the place of one of `than` elements is no more than half of it."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and 2 * numel_hint(val) <= than


def _moves_before(node: fx.Node) -> dict[fx.Node, None]:
    """What made the operand of `node` without computing; copies of a part may be saved, being less than the whole."""
    found: dict[fx.Node, None] = {}
    pending = [operand(node, 0)]
    while pending:
        move = pending.pop()
        sources = _sources(move)
        if sources and move not in found and (_is_view_of_parts(move) or not _shrinks(move, sources)):
            found[move] = None
            pending += sources
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operands whose elements `node` moves; none if it does more than that."""
    if is_getitem(node):
        return [operand(node, 0)] if packet_of(operand(node, 0)) in _VIEWS else []
    if packet_of(node) not in _VIEWS | _COPIES:
        return []
    first = node.args[0]
    return [x for x in (first if isinstance(first, (list, tuple)) else [first]) if isinstance(x, fx.Node)]


def _is_view_of_parts(node: fx.Node) -> bool:
    return is_getitem(node) or packet_of(node) in _VIEWS


def _shrinks(node: fx.Node, sources: list[fx.Node]) -> bool:
    size = numel_hint(node.meta["val"])
    return any(numel_hint(source.meta["val"]) > size for source in sources)
