"""What axis cp splits: the sequences of a graph, and the calls from which their splits spread.

A sequence is what the query rows of an attention run over. Where rows are cut into windows, each with an attention of
its own, the sequence is that of the windows: an attention inside of a window needs no other. Where attentions along
the rows and along the columns of an image take turns, one of both is split for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

import torch.fx as fx

from spcompile.graph.sizes import hint
from spcompile.sharding.index_spaces import IndexSpaces, OpSpaces, convolves
from spcompile.sharding.propagate import Choice
from spcompile.sharding.spaces import Space, leaves

UNREAD_ATTENTION = "spx_unread_attention"  # in meta["custom"] of a softmax: the dim of its query rows, from the end
SCORES = "spx_scores"  # the same where it may be no attention: what reads the weights is no product with values


def sequence_seeds(spaces: IndexSpaces, entries: Set[Space] = frozenset(), degree: int = 2) -> dict[fx.Node, Choice]:
    """For each attention the factor that its ranks are to split: query rows, keys of few queries, or windows.

    So for the softmax of an attention that stayed written out: it is split by rows, and reads all keys. Where there is
    none, for any softmax over products of two sequences; and where there is none of these, for convolutions.

    entries: what is no sequence, but entries of the batch.
    degree: the ranks that a window's neighbours must be enough for.
    """
    leaders = _leaders(spaces.calls, UNREAD_ATTENTION) or _leaders(spaces.calls, SCORES)
    if not leaders:
        return {node: Choice(made) for node, made in _convolutions(spaces)}
    inside = _inside_of(spaces)
    wanted = {node: _windows_or_rows(spaces.calls[node], leaders[node], inside, entries, degree) for node in leaders}
    chosen: set[Space] = set()
    for node in sorted(wanted, key=lambda node: -hint(wanted[node][1].size)):  # longest first
        alone = [found for found in _batch_of(spaces.calls[node], leaders[node]) if found[1] in chosen]
        if alone and wanted[node][1] not in chosen:
            wanted[node] = alone[0]
        chosen.add(wanted[node][1])
    return {node: choice for node, (choice, _) in wanted.items()}


def _windows_or_rows(
    call: OpSpaces, leader: str, inside: Mapping[Space, Set[Space]], entries: Set[Space], degree: int
) -> tuple[Choice, Space]:
    """What an attention is to be split over: what its rows are inside of, if there is enough of it, or its rows."""
    rows = call.leaves_of(leader)[0]
    for choice, space in _batch_of(call, leader):
        if space not in entries and rows in inside.get(space, ()) and hint(space.size) >= degree:
            return choice, space
    return Choice(leader), rows


def sequence_families(calls: Mapping[fx.Node, OpSpaces]) -> set[Space]:
    """The families of spaces that the query rows of attention, read or not, run over: the sequences of a graph.

    Where there is no attention, those that convolutions have windows of, and what they make of them. What is put
    together to a sequence is one as well, and so is what is cut off: text and image in one attention.
    """
    leaders = _leaders(calls, UNREAD_ATTENTION) or _leaders(calls, SCORES)
    found = {calls[node].leaves_of(leader)[0].family() for node, leader in leaders.items()}
    found = found or {call.leaves_of(name)[0].family() for call in calls.values() for name in _windowed(call)}
    moved = [families for call in calls.values() if len(families := _moved_families(call)) > 1]
    while more := [families for families in moved if not found.isdisjoint(families) and not families <= found]:
        found.update(*more)
    return found


def _moved_families(call: OpSpaces) -> set[Space]:
    """The families between which a call moves elements, on an axis whose ranks do not send them to each other."""
    moving = call.rule.moving
    if moving is None or not moving.moved:
        return set()
    now, then = ([dim for dims in (*rule.operands, *rule.results) for dim in dims] for rule in (call.rule, moving))
    places = (dim for dim, moved in zip(now, then, strict=True) if len(moved) == 1 and moved[0] in moving.moved)
    return {
        leaves_of_dim[0].family() for dim in places if (leaves_of_dim := [s for f in dim for s in call.leaves_of(f)])
    }


def _leaders(calls: Mapping[fx.Node, OpSpaces], key: str) -> dict[fx.Node, str]:
    """Attentions, and the factor of each that is split where it is split by rows."""
    found: dict[fx.Node, str] = {}
    for node, call in calls.items():
        rows = node.meta.get("custom", {}).get(key)
        leader = _row_factor(call, rows) if rows else _leader(call)
        if leader is not None:
            found[node] = leader
    return found


def _leader(call: OpSpaces) -> str | None:
    """The query rows, or the keys where ranks merge what they see; None for one key and one query."""
    in_results = {factor for dims in call.rule.results for dim in dims for factor in dim}
    for leader, follower in call.rule.paired.items():
        if follower in call.rule.completed:
            return follower
        if leader in in_results - call.rule.replicated:
            return leader
    return None


def _row_factor(call: OpSpaces, dim: int) -> str | None:
    """The factor of the rows of scores, [..., S, T] or with the rows elsewhere."""
    rows = call.rule.results[0][dim]
    return rows[0] if rows and rows[0] not in call.rule.replicated else None


def _batch_of(call: OpSpaces, leader: str) -> Iterator[tuple[Choice, Space]]:
    """What an attention does for each index alone, beside its rows, and the choices that split it over that."""
    for factor in (factor for dim in call.rule.results[0] for factor in dim):
        if factor not in call.rule.replicated and factor != leader:
            for part, space in enumerate(call.leaves_of(factor)):
                yield Choice(factor, part), space


def _inside_of(spaces: IndexSpaces) -> dict[Space, set[Space]]:
    """For each space what stands inside of it in some dim: for windows their rows."""
    found: dict[Space, set[Space]] = {}
    for results in spaces.values.values():
        for dim in (leaves(dim) for dims in results for dim in dims):
            for at, space in enumerate(dim):
                found.setdefault(space, set()).update(dim[at + 1 :])
    return found


def _windowed(call: OpSpaces) -> Iterator[str]:
    """The factors on both sides of a product with weights along windows, whether or not an axis may split them."""
    for made, window in (call.rule.moving or call.rule).windows.items() if convolves(call.rule) else ():
        yield from (made, window.of)


def _convolutions(spaces: IndexSpaces) -> Iterator[tuple[fx.Node, str]]:
    """Products with weights along windows, and the first dim that each makes of them."""
    for node, call in spaces.calls.items():
        if call.rule.windows and convolves(call.rule):
            yield node, next(iter(call.rule.windows))
