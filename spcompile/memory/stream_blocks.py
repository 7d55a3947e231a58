"""The blocks of a model, found from its graph: what repeats along the residual stream.

Where a single value of the forward is all that later calls read of earlier ones, the graph can be cut: that value is
the stream. Between two cuts lies a segment. Segments whose heavy ops are alike repeat with a period (attention, MLP,
attention, MLP: 2), and a block is one period. A value that a long row of calls reads besides the stream, such as the
output of an encoder, is left out of account: it is there anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from spcompile.memory.joint import Joint, ancestors

_LEAST_REPEATED = 0.6  # of the segments, for a period to be one
_MOST_PERIOD = 16  # segments


@dataclass(frozen=True)
class Blocks:
    """inputs: the value of the stream at the start of each block, in order. period: segments of a block; 0: none."""

    inputs: tuple[fx.Node, ...]
    period: int


def find_blocks(joint: Joint, is_heavy: Callable[[fx.Node], bool]) -> Blocks:
    """is_heavy: says of a call whether it is a product, an attention or communication."""
    on_the_way = ancestors(joint.returned) & _activations(joint)
    order = [node for node in joint.forward if node in on_the_way]
    cuts = _cuts(joint, order, is_heavy)
    kinds = [_kind(segment, is_heavy) for _, segment in cuts]
    period = _period(kinds)
    if not period:
        return Blocks(tuple(value for value, _ in cuts), 0)
    first = next(at for at in range(len(kinds) - period) if kinds[at] == kinds[at + period])
    starts = [value for at, (value, _) in enumerate(cuts) if (at - first) % period == 0 or at < first]
    return Blocks(tuple(starts), period)


def _activations(joint: Joint) -> set[fx.Node]:
    """Values that depend on parameters and on something else: neither casts of weights nor masks and positions."""
    sources: dict[fx.Node, frozenset[object]] = {}
    for node in joint.inputs:
        sources[node] = frozenset([node if node in joint.parameters else "data"])
    for node in joint.forward:
        found = frozenset().union(*(sources.get(value, frozenset()) for value in node.all_input_nodes))
        sources[node] = frozenset(sorted(found, key=str)[:2]) | (found & {"data"})
    return {node for node in joint.forward if len(sources[node]) > 1}


def _cuts(
    joint: Joint, order: Sequence[fx.Node], is_heavy: Callable[[fx.Node], bool]
) -> list[tuple[fx.Node, list[fx.Node]]]:
    """(value of the stream, the calls between it and the next cut), where those calls hold a heavy one."""
    last = {}
    for node in order:
        for value in node.all_input_nodes:
            last[joint.storage[value]] = node
    long_lived = _read_all_along(joint, order, last)
    live: dict[fx.Node, None] = {}
    cuts: list[tuple[fx.Node, list[fx.Node]]] = []
    stream = Counter[object]()
    for node in order:
        root = joint.storage[node]
        if root is node and last.get(node, node) is not node and node not in long_lived:
            live[node] = None
        for value in node.all_input_nodes:
            if last.get(joint.storage[value]) is node:
                live.pop(joint.storage[value], None)
        if cuts:
            cuts[-1][1].append(node)
        if len(live) == 1:
            (value,) = live
            if not cuts or cuts[-1][0] is not value:
                stream[_shape(value)] += 1
                cuts.append((value, []))
    return _of_the_stream(cuts, is_heavy)


def _of_the_stream(
    cuts: list[tuple[fx.Node, list[fx.Node]]], is_heavy: Callable[[fx.Node], bool]
) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Cuts at values of the most usual shape; the last one where no heavy call lies between two."""
    usual = Counter(_shape(value) for value, _ in cuts).most_common(1)
    found: list[tuple[fx.Node, list[fx.Node]]] = []
    for value, segment in cuts:
        if _shape(value) != usual[0][0]:
            if found:
                found[-1][1].extend(segment)
        elif found and not any(map(is_heavy, found[-1][1])):
            found[-1] = (value, list(segment))
        else:
            found.append((value, list(segment)))
    return found


def _read_all_along(joint: Joint, order: Sequence[fx.Node], last: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """Values that are alive along at least a third of the calls and have more readers than a stream's value has."""
    place = {node: at for at, node in enumerate(order)}
    return {
        node
        for node in order
        if joint.storage[node] is node
        and node in last
        and 3 * (place[last[node]] - place[node]) > len(order)
        and len(node.users) > 4
    }


def _kind(segment: Sequence[fx.Node], is_heavy: Callable[[fx.Node], bool]) -> tuple[object, ...]:
    return tuple((node.target, _shape(node)) for node in segment if is_heavy(node))


def _shape(node: fx.Node) -> object:
    value = node.meta.get("val")
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, torch.Tensor) else None


def _period(kinds: Sequence[object]) -> int:
    """After how many segments they repeat, for most of them; 0 if they do not."""
    for period in range(1, min(_MOST_PERIOD, len(kinds) // 2) + 1):
        pairs = [kinds[at] == kinds[at + period] for at in range(len(kinds) - period)]
        if sum(pairs) >= _LEAST_REPEATED * len(pairs):
            return period
    return 0
