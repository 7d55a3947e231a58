"""Heads in stages: of groups of heads that travel in messages of their own, one is projected, sent and used at a time.

Where Ulysses sends groups of heads (pass split-all-to-alls), all heads are projected first and all messages are made
before the first attention, and gradients of all heads come back before they go through rotations. So queries, keys and
values of all heads stand whole, several times. In stages they do not:

    a message of a group     its heads are projected from a part of the weight, when its attention is about to run
    gradients of a group     go through what stood between projection and message alone, when they arrive
    results, gradients       are put together where products read them: one product for all heads, as before

Numbers stay what they are: each row of a product is computed as before, in smaller products. It is what Untied Ulysses
does (arXiv 2602.21196), but for sums over groups. On the joint graph, so that a plan of memory counts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from spcompile.collectives.typed_calls import AllToAllCall
from spcompile.diagnostics import SourceLine, source_of
from spcompile.graph.aten_ops import packet_of
from spcompile.graph.edit import is_getitem, is_tensor, operand, shape_of
from spcompile.graph.storage import root_of, storage_bytes
from spcompile.memory.joint import ancestors
from spcompile.memory.parts_of_dims import Cut, PartsOfValues, is_whole_product

aten = torch.ops.aten
_MOVES = {
    aten._unsafe_view,
    aten.cat,
    aten.clone,
    aten.expand,
    aten.permute,
    aten.reshape,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
}


@dataclass(frozen=True)
class HeadStages:
    """What runs in stages.

    count: of stages, the most. products: names of those of all heads, which became products of groups. bytes: of the
    largest that no longer stands whole, less a part of it. op, source: of the first. seconds: that it costs a step.
    """

    count: int
    products: tuple[str, ...]
    bytes: int
    op: str
    source: SourceLine | None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Piece:
    """A part that a call takes out of a value, equal to the others."""

    node: fx.Node
    source: fx.Node
    cut: Cut
    number: int


def sends_groups(graph: fx.Graph) -> bool:
    """Whether groups of heads go to all-to-alls of their own, without which there are no stages, of known lengths."""
    if any(not isinstance(size, int) for node in graph.nodes if is_tensor(node) for size in shape_of(node)):
        return False
    return any(_pieces_sent(graph))


def may_lower(graph: fx.Graph, at: fx.Node | None, saved: Collection[fx.Node]) -> bool:
    """Whether a value that stages would cut is there during a call of a joint graph: else they change nothing there.

    What is saved is there anyhow. What is made again in the backward is there from its first reader there.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    backward = _behind_tangents(graph)
    if at not in place:
        return False
    pieces = list(_pieces_sent(graph))
    sent = _without_products([piece.node for piece in pieces], lambda node: node.all_input_nodes)
    messages = {message for piece in pieces for message in _messages_of(piece.node)}
    came = [node for node in backward if AllToAllCall.is_call(node) and node not in messages]
    stays = {root_of(node) for node in saved}
    for node in (*sent, *messages, *_without_products(came, lambda node: list(node.users))):
        in_phase = [place[user] for user in node.users if (user in backward) == (at in backward)]
        start = place[node] if (node in backward) == (at in backward) else min(in_phase, default=0)
        if root_of(node) not in stays and start <= place[at] <= max(in_phase, default=-1):
            return True
    return False


def _behind_tangents(graph: fx.Graph) -> set[fx.Node]:
    """The calls of a joint graph that need a gradient of an output."""
    found = {node for node in graph.find_nodes(op="placeholder") if "tangents" in str(node.target)}
    for node in graph.nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _without_products(nodes: Iterable[fx.Node], more: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes and what `more` leads to, up to products of all heads, to inputs and to the output."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            pending += [] if is_whole_product(node) else more(node)
    return found


def stage_heads(graph: fx.Graph) -> HeadStages | None:
    """Rewrite a joint graph that sends groups in place; None, and no change, where nothing in it can run in stages."""
    parts = PartsOfValues()
    while sent := [piece for piece in _pieces_sent(graph) if parts.reaches(piece.source, piece.cut)]:
        for piece in sent:
            part = parts.part(piece.source, piece.cut, piece.number, piece.node)
            assert shape_of(part) == shape_of(piece.node), (part, piece.node)
            piece.node.replace_all_uses_with(part)
        parts.forget_what_reaches()  # projections that were fused may now be cut once more, by groups
    if not parts.products:
        return None
    late = {*parts.written, *_ways_to_readers(parts.written)}
    written = len(parts.written)
    cuts = sorted(set(parts.products.values()), key=str)
    for value, cut in list(_joined_in_products(graph, cuts, parts)):
        pieces = [parts.part(value, cut, number, value) for number in range(cut.parts)]
        value.replace_all_uses_with(parts.join(value, cut, pieces, value))
    early = set(parts.written[written:])
    products = tuple(parts.products)
    count, size = max((cut.parts, storage_bytes(node)) for node, cut in parts.products.items())
    names, first = tuple(node.name for node in products), products[0]
    found = HeadStages(count, names, size - size // count, getattr(first.target, "__name__", ""), source_of(first))
    _put_together_what_is_read_whole(parts)
    _in_order_of_use(graph, late, early)
    graph.eliminate_dead_code()
    return found


def _pieces_sent(graph: fx.Graph) -> Iterator[_Piece]:
    """Equal parts of a value, two of which at least go to all-to-alls of their own, and are only moved on the way."""
    found: dict[fx.Node, list[_Piece]] = {}
    for node in graph.nodes:
        piece = _piece_of(node)
        if piece is not None and _messages_of(node):
            found.setdefault(piece.source, []).append(piece)
    for pieces in found.values():
        messages = {message for piece in pieces for message in _messages_of(piece.node)}
        if len(messages) > 1 and len({piece.cut for piece in pieces}) == 1:
            yield from pieces


def _piece_of(node: fx.Node) -> _Piece | None:
    if is_getitem(node) and packet_of(operand(node, 0)) is aten.split:
        split, number = operand(node, 0), node.args[1]
        source, width = operand(split, 0), split.args[1]
        dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        start = number * width  # type: ignore[operator]
    elif packet_of(node) is aten.slice:
        source, dim, start = operand(node, 0), *node.args[1:3]
        width = shape_of(node)[dim] if isinstance(dim, int) else 0
        if len(node.args) > 4:
            return None
    else:
        return None
    assert isinstance(dim, int)
    assert isinstance(width, int)
    size = shape_of(source)[dim]
    if not isinstance(start, int) or not 0 < width < size or size % width or start % width:
        return None
    return _Piece(node, source, Cut(dim % len(shape_of(source)), width, size // width), start // width)


def _messages_of(node: fx.Node) -> set[fx.Node]:
    """The all-to-alls that a value goes to, where it is moved alone on all ways; else none."""
    found: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if AllToAllCall.is_call(user):
                found.add(user)
            elif packet_of(user) not in _MOVES and not is_getitem(user):
                return set()
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def _ways_to_readers(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What only moves or sends values, from these on up to what computes with them."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        for user in pending.pop().users:
            is_move = packet_of(user) in _MOVES or is_getitem(user) or AllToAllCall.is_call(user)
            if is_move and user not in found:
                found.add(user)
                pending.append(user)
    return found


def _joined_in_products(graph: fx.Graph, cuts: Sequence[Cut], parts: PartsOfValues) -> Iterator[tuple[fx.Node, Cut]]:
    """Values that products read and that are made, index by index, of gradients of groups put together."""
    seen: set[fx.Node] = set()
    for product in [node for node in graph.nodes if is_whole_product(node)]:
        for value in product.all_input_nodes:
            value = operand(value, 0) if packet_of(value) is aten.t else value
            if value in seen or not is_tensor(value):
                continue
            seen.add(value)
            for cut in cuts:
                has_parts = len(shape_of(value)) == 2 and shape_of(value)[1] % (cut.inner * cut.parts) == 0
                if has_parts and parts.reaches(value, cut) and _ends_where_gradients_are_joined(value, cut, parts):
                    yield value, cut
                    break


def _ends_where_gradients_are_joined(value: fx.Node, cut: Cut, parts: PartsOfValues) -> bool:
    """Whether a value ends in joins of what all-to-alls brought."""
    joins = parts.joins_under(value, cut)
    return bool(joins) and all(_is_from_an_all_to_all(x) for join in joins for x in join.all_input_nodes)


def _is_from_an_all_to_all(node: fx.Node) -> bool:
    while packet_of(node) in _MOVES or is_getitem(node):
        node = node.all_input_nodes[0]
    return AllToAllCall.is_call(node)


def _put_together_what_is_read_whole(parts: PartsOfValues) -> None:
    """Products of all heads that something still reads: of their parts, rather than computed twice."""
    for product, cut in list(parts.products.items()):
        if any(_is_read(user) for user in product.users):
            behind = product.next
            pieces = [parts.part(product, cut, number, behind) for number in range(cut.parts)]
            whole = parts.join(product, cut, pieces, behind)
            product.replace_all_uses_with(whole)


def _is_read(node: fx.Node) -> bool:
    """Whether something that stays reads a value."""
    pending, seen = [node], {node}
    while pending:
        value = pending.pop()
        if value.op == "output" or value.is_impure():
            return True
        new = [user for user in value.users if user not in seen]
        seen.update(new)
        pending += new
    return False


def _in_order_of_use(graph: fx.Graph, late: set[fx.Node], early: set[fx.Node]) -> None:
    """Late calls right before their first readers, early ones right behind the last of what they read; dead ones."""
    order: list[fx.Node] = []
    done: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [value for value in top.all_input_nodes if value not in done]
            stack += reversed(missing)
            if not missing:
                stack.pop()
                if top not in done:
                    done.add(top)
                    order.append(top)
                    stack += [user for user in top.users if user in early and done.issuperset(user.all_input_nodes)]

    output = graph.output_node()
    alive = ancestors([output])
    calls = [node for node in graph.nodes if node in alive or node.is_impure()]
    for node in [*(node for node in calls if node not in late and node not in early), *calls, *graph.nodes]:
        if node is not output:
            place(node)
    for node in order:
        output.prepend(node)
