"""Which values of a graph of the whole batch have entries of it, of which each rank of dp holds its own.

They are known from the inputs. But where every rank passes one entry, an input with a first dim of 1 may also be one
that all ranks share. That matters only where its entries are summed by themselves, or where it alone leads to an output
with a gradient: a sum over each rank's own entry goes on over `dp`, one over a shared entry does not. There entries
must be certain: attention has them, or an op would refuse its operands if one of them had a single entry while the
others have several. What a total of all entries is divided by is one number that all ranks share.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.frames import name_of
from spcompile.capture.retrace import OWN
from spcompile.check.states import needs_gradient, trainable_names
from spcompile.diagnostics import BatchNotSplit, source_of
from spcompile.graph.aten_ops import overloads, tensor_operands
from spcompile.graph.edit import is_getitem, shape_of
from spcompile.graph.sizes import divides, hint, same, same_shape
from spcompile.sharding.group_counts import CASTS
from spcompile.sharding.index_spaces import IndexSpaces
from spcompile.sharding.propagate import (
    Choice,
    Place,
    Placements,
    place_of,
    propagate,
    shards_results,
    space_at,
)
from spcompile.sharding.rules.rule import tensor_results
from spcompile.sharding.sequences import UNREAD_ATTENTION

_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_DIVISIONS = frozenset(overloads("div.Tensor true_divide.Tensor"))
_MOVES = frozenset((*CASTS, *overloads("clamp clamp_min")))
_LEGAL = "two entries or more on every rank of dp; for a shared input, one without a dim of 1 in front"


class NotTheBatch(BatchNotSplit):
    """Other inputs may have the entries, or the same in another dim."""


class SharedByRanks(NotTheBatch):
    """Inputs of one number have no entries. names: of their sources, as Dynamo writes them."""

    def __init__(self, *args: Any, names: frozenset[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = names


def mark_batch(graph: fx.Graph, degree: int) -> None:
    """In a graph that nobody has marked, entries are in all of the user's inputs that are as long as the first one."""
    inputs = [n for n in graph.find_nodes(op="placeholder") if _is_users(n) and tensor_results(n) and shape_of(n)]
    if degree == 1 or any(OWN in n.meta for n in inputs):
        return
    for node in inputs:
        entries, *rest = shape_of(node)
        if same(entries, shape_of(inputs[0])[0]) and hint(entries) % degree == 0:
            with node.meta["val"].fake_mode:
                node.meta[OWN] = node.meta["val"].new_empty((entries // degree, *rest))


def inputs_with_batch(graph: fx.Graph) -> dict[fx.Node, Place]:
    """The tensors of which each rank passes its own entries, and in which dim they are."""
    inputs = [n for n in graph.find_nodes(op="placeholder") if OWN in n.meta and tensor_results(n)]
    pairs = ((n, enumerate(zip(shape_of(n), n.meta[OWN].shape, strict=True))) for n in inputs)
    return {n: Place(next(dim for dim, (all_ranks, own) in sizes if not same(all_ranks, own))) for n, sizes in pairs}


def _is_users(placeholder: fx.Node) -> bool:
    """Whether a placeholder is what the user passes in: no buffer, and no weight, which has no entries."""
    return not placeholder.meta.get("state") and (not placeholder.meta.get("trainable") or OWN in placeholder.meta)


def require_batch(graph: fx.Graph, spaces: IndexSpaces, placements: Placements, degree: int) -> None:
    """Check that every attention is over entries, and that an entry of which each rank passes one is certainly its own.

    Groups that the entries are cut into must be whole ones on every of the `degree` ranks.

    Raises:
        BatchNotSplit: names the attention, or the inputs.
    """
    inputs = inputs_with_batch(graph)
    names = " and ".join(f"dim {place.dim} of {n.name}" for n, place in inputs.items())
    attentions = [n for n in graph.nodes if n in spaces.calls and _is_attention(n, spaces)]
    read = _read_by(graph)
    for node in (n for n in attentions if n in read):
        choice, paired = placements.choices.get(node), spaces.calls[node].rule.paired
        if choice is None or choice.factor in {*paired, *paired.values()}:
            found = f"{_where_the_batch_is(graph, spaces, node)}; an attention mixes what ranks have in {names}"
            raise NotTheBatch(found, where=source_of(node), legal="inputs with entries of the batch, or DDP over dp")
    first = next((n for n in graph.find_nodes(op="placeholder") if _is_users(n) and tensor_results(n)), None)
    if not attentions and first is not None and inputs.get(first) != Place(0):
        found = f"no attention tells which inputs have entries, and {first.name} is not as long as {names}"
        raise NotTheBatch(found, legal="the entries in the first input, or DDP over dp")
    for node, place in inputs.items():
        groups = space_at(spaces.values[node][0], place).size
        if not divides(degree, groups):
            found = f"the model makes {hint(groups)} groups of entries over dp = {degree}"
            raise BatchNotSplit(found, legal="groups of entries that no two ranks share")
    if len(inputs) > 1 and all(same(n.meta[OWN].shape[place.dim], 1) for n, place in inputs.items()):
        shared = [n for n in inputs if len(shape_of(n)) == 1 and _divides_totals(n, placements, read)]
        if shared:
            names = ", ".join(n.name for n in shared)
            found = f"{names}: a total of all entries is divided by it, so it is one number that all ranks share"
            sources = frozenset(name_of(n.meta["grapharg"].source) for n in shared if "grapharg" in n.meta)
            raise SharedByRanks(found, legal=_LEGAL, names=sources)
        _require_own_entries(graph, spaces, placements, {n for n in attentions if n in placements.choices})


def _divides_totals(value: fx.Node, placements: Placements, read: set[fx.Node]) -> bool:
    """Whether all that is done with a value is that sums over all entries are divided by it."""

    def is_total(x: Any) -> bool:
        return isinstance(x, fx.Node) and x in read and (x, 0) not in placements.places

    def divides_or_moves(user: fx.Node) -> bool:
        if user.target in _DIVISIONS:
            return user.args[1] is value and is_total(user.args[0])
        return user.target in _MOVES and _divides_totals(user, placements, read)

    return bool(value.users) and all(map(divides_or_moves, value.users))


def _where_the_batch_is(graph: fx.Graph, spaces: IndexSpaces, attention: fx.Node) -> str:
    """In words, from the batch of an attention."""
    if "b" not in spaces.calls[attention].rule.sizes:
        return "no input has the batch of an attention"
    found = propagate(spaces, {attention: Choice("b")}).places
    inputs = [n for n in graph.find_nodes(op="placeholder") if _is_users(n) and (n, 0) in found]
    return " and ".join(f"{n.name} has the batch in dim {found[n, 0].dim}" for n in inputs) or "no input has a batch"


def _is_attention(node: fx.Node, spaces: IndexSpaces) -> bool:
    return bool(spaces.calls[node].rule.paired) or UNREAD_ATTENTION in node.meta.get("custom", {})


def _read_by(graph: fx.Graph) -> set[fx.Node]:
    """All that depends on what the user passes."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_users(node) if node.op == "placeholder" else not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _require_own_entries(
    graph: fx.Graph, spaces: IndexSpaces, placements: Placements, attentions: set[fx.Node]
) -> None:
    """Check that every sum over entries, and every output with a gradient, is over values that certainly have them."""
    certain = _certain(graph, spaces, placements, attentions)
    gradient = needs_gradient(graph, trainable_names(graph))
    for node in graph.nodes:
        choice = placements.choices.get(node)
        if node.op == "output":
            read = [n for n in node.all_input_nodes if (n, 0) in placements.places and n in gradient]
            doubtful = [n for n in read if n not in certain]
        elif choice is not None and not shards_results(spaces.calls[node], choice):
            read = _split_operands(node, spaces, choice)
            doubtful = [] if any(n in certain for n in read) else read
        else:
            continue
        if doubtful:
            names = ", ".join(sorted(_inputs_of(doubtful[0], placements)))
            where = source_of(node if node.op != "output" else doubtful[0])
            found = f"{names}: one entry, this rank's own or one that all ranks share, and its entries are summed"
            raise BatchNotSplit(found, where=where, legal=_LEGAL)


def _split_operands(node: fx.Node, spaces: IndexSpaces, choice: Choice) -> list[fx.Node]:
    call = spaces.calls[node]
    pairs = zip(tensor_operands(node), call.rule.operands, strict=True)
    return [read for read, dims in pairs if place_of(dims, call, choice) is not None]


def _certain(graph: fx.Graph, spaces: IndexSpaces, placements: Placements, attentions: set[fx.Node]) -> set[fx.Node]:
    """The values that have entries however the inputs are read, to a fixed point in both directions."""
    found = set(attentions)
    for node in attentions:
        q_k_v = tensor_operands(node)[:3]
        found.update(n for n in _split_operands(node, spaces, placements.choices[node]) if n in q_k_v)
    inputs_of = _inputs_split_into(graph, spaces, placements)
    size = -1
    while size != len(found):
        found |= {x for node in found for x in inputs_of.get(node, ()) if len(inputs_of[node]) == 1}
        size = len(found)
        for node in (*graph.nodes, *reversed(graph.nodes)):
            if is_getitem(node):
                pair = {node, *node.all_input_nodes}
                found |= pair if pair & found else set()
                continue
            if node not in placements.choices:
                continue
            choice = placements.choices[node]
            read = _split_operands(node, spaces, choice)
            if any(n in found for n in read) and shards_results(spaces.calls[node], choice):
                found.add(node)
            if node in found and len(set(read)) == 1:
                found.update(read)
            if node in found or any(n in found for n in read):
                found.update(n for n in read if n not in found and _must_have_entries(node, n, placements))
    return found


def _inputs_split_into(
    graph: fx.Graph, spaces: IndexSpaces, placements: Placements
) -> dict[fx.Node, frozenset[fx.Node]]:
    """The inputs that a value's entries come from: one that certainly has entries has them from one of these."""
    found = {n: frozenset([n]) for n in inputs_with_batch(graph)}
    for node in graph.nodes:
        if is_getitem(node):
            found[node] = found.get(node.all_input_nodes[0], frozenset())
        elif node in placements.choices:
            read = _split_operands(node, spaces, placements.choices[node])
            found[node] = frozenset().union(*(found.get(n, frozenset()) for n in read))
    return found


def _must_have_entries(node: fx.Node, value: fx.Node, placements: Placements) -> bool:
    """Whether a call would refuse, or give another shape, if `value` alone had one entry."""
    split = placements.places.get((value, 0))
    example = value.meta["val"]
    if split is None:
        return False
    (entries, *_) = (shape_of(n)[place.dim] for n, place in inputs_with_batch(node.graph).items())
    try:
        result = _evaluate(node, {value: example.narrow(split.dim, 0, example.shape[split.dim] // entries)})
    except Exception:
        return True
    wanted = node.meta["val"]
    return isinstance(wanted, torch.Tensor) and not same_shape(result, wanted)


def _evaluate(node: fx.Node, instead: Mapping[fx.Node, torch.Tensor]) -> Any:
    """The result of a call on example values, some of them others than its operands have.

    What is learnt about symbols on the way holds for no real size: it becomes no guard. A call that fails on such sizes
    is an answer, not an error for torch to log.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: instead.get(n, n.meta["val"]))
    example: Any = next(iter(instead.values()))
    target: Any = node.target
    symbols = example.fake_mode.shape_env
    was_disabled, _FAKE_LOG.disabled = _FAKE_LOG.disabled, True
    try:
        with example.fake_mode, torch.no_grad(), symbols.suppress_guards() if symbols is not None else nullcontext():
            return target(*args, **kwargs)
    finally:
        _FAKE_LOG.disabled = was_disabled


def _inputs_of(value: fx.Node, placements: Placements) -> set[str]:
    """The names of the inputs with entries that a value depends on."""
    seen, todo = {value}, [value]
    while todo:
        for read in todo.pop().all_input_nodes:
            if read not in seen and (read, 0) in placements.places:
                seen.add(read)
                todo.append(read)
    return {n.name for n in seen if n.op == "placeholder"}
