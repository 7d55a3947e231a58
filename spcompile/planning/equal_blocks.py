"""Captured graphs of fewer layers: blocks that are the same but for their parameters are left out.

The blocks are found along the residual stream (`spcompile.memory.stream_blocks`), never by names. Two are equal if
they make the same calls on values of the same shapes. What stands between the first and the last of them only reads
the stream, so the graph without some of them is the graph of the model with fewer layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import copy_module
from spcompile.graph.storage import outputs_of
from spcompile.machine.accelerators import Accelerator
from spcompile.memory.joint import Joint
from spcompile.memory.stream_blocks import find_blocks
from spcompile.schedule.op_cost import is_matmul, matmul_flops

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class EqualBlocks:
    """A run of equal blocks of a captured graph: blocks[i] holds the calls between streams[i] and streams[i + 1]."""

    streams: tuple[fx.Node, ...]
    blocks: tuple[tuple[fx.Node, ...], ...]

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def least(self) -> int:
        """How many to keep, for as much work to be left as two blocks have: what is sent hides behind neighbours."""
        inside = sum(map(_is_heavy, self.blocks[0]))
        outside = sum(map(_is_heavy, self.streams[0].graph.nodes)) - inside * self.count
        return max(0, 2 - outside // inside)


def find_equal_blocks(graph: fx.Graph, accelerator: Accelerator) -> EqualBlocks | None:
    """The longest run of equal blocks that can be left out, if there is one of at least two."""
    joint = _forward_only(graph, accelerator)
    streams = find_blocks(joint, _is_heavy).inputs
    place = {node: at for at, node in enumerate(graph.nodes)}
    calls = list(graph.nodes)
    blocks = [tuple(calls[place[first] + 1 : place[last] + 1]) for first, last in pairwise(streams)]
    shared = _read_by_several(blocks)
    kinds = [_what_it_computes(stream, block, shared) for stream, block in zip(streams, blocks, strict=False)]
    first, last = _longest_run(kinds)
    if last - first < 2 or not _leave_nothing_behind(blocks[first:last]):
        return None
    return EqualBlocks(streams[first : last + 1], tuple(blocks[first:last]))


def shortened(
    gm: fx.GraphModule, inputs: Sequence[Any], found: EqualBlocks, keep: int
) -> tuple[fx.GraphModule, list[int]]:
    """A copy with the first `keep` of the equal blocks, and which of the inputs it still has, by place."""
    result = copy_module(gm)
    here = {node.name: node for node in result.graph.nodes}
    own = [here[node.name] for node in gm.graph.find_nodes(op="placeholder")]
    is_read = [bool(node.users) for node in own]
    if keep < found.count:
        here[found.streams[-1].name].replace_all_uses_with(here[found.streams[keep].name])
    result.graph.eliminate_dead_code()
    kept = [place for place, node in enumerate(own) if node.users or not is_read[place]]
    for place, node in enumerate(own):
        if place not in kept:
            result.graph.erase_node(node)
    result.recompile()
    return result, kept


def _forward_only(graph: fx.Graph, accelerator: Accelerator) -> Joint:
    placeholders = tuple(graph.find_nodes(op="placeholder"))
    return Joint(
        inputs=placeholders,
        forward=tuple(node for node in graph.nodes if node.op not in ("placeholder", "output")),
        backward=(),
        returned=tuple(node for node in outputs_of(graph) if isinstance(node, fx.Node)),
        gradients=(),
        parameters=frozenset(node for node in placeholders if node.meta.get("trainable")),
        accelerator=accelerator,
    )


def _is_heavy(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return is_matmul(node) or node.target is _SDPA or matmul_flops(node) > 0


def _read_by_several(blocks: Sequence[Sequence[fx.Node]]) -> set[fx.Node]:
    """Inputs that more than one block reads."""
    readers: dict[fx.Node, set[int]] = {}
    for number, block in enumerate(blocks):
        for node in block:
            for value in node.all_input_nodes:
                readers.setdefault(value, set()).add(number)
    return {value for value, numbers in readers.items() if len(numbers) > 1 and value.op == "placeholder"}


def _what_it_computes(stream: fx.Node, block: Sequence[fx.Node], shared: set[fx.Node]) -> tuple[object, ...]:
    """Equal for blocks that compute the same of the stream, of parameters of their own, and of what all blocks read."""
    names: dict[fx.Node, object] = {stream: "stream"}

    def name(value: fx.Node) -> object:
        if value not in names:
            is_own = value.op == "placeholder" and value not in shared
            names[value] = ("own", len(names), _type(value), value.meta.get("trainable")) if is_own else value.name
        return names[value]

    rows: list[object] = []
    for node in block:
        read = [name(value) for value in node.all_input_nodes]
        args = fx.node.map_arg((node.args, node.kwargs), lambda value: repr(names[value]))
        rows.append((str(node.target), read, repr(args), repr(_type(node)), str(node.meta.get("recompute"))))
        names[node] = ("call", len(names))
    return tuple(rows)


def _type(node: fx.Node) -> object:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return [(tuple(map(str, x.shape)), str(x.dtype)) if isinstance(x, torch.Tensor) else str(x) for x in leaves]


def _longest_run(kinds: Sequence[object]) -> tuple[int, int]:
    """(first, behind the last) of the longest run of equal neighbours."""
    best, start = (0, 0), 0
    for at in range(1, len(kinds) + 1):
        if at == len(kinds) or kinds[at] != kinds[start]:
            best = max(best, (start, at), key=lambda run: run[1] - run[0])
            start = at
    return best


def _leave_nothing_behind(blocks: Sequence[Sequence[fx.Node]]) -> bool:
    """Whether what blocks behind the first compute is read outside of them only where it is the stream."""
    inside = {node: number for number, block in enumerate(blocks) for node in block}
    for number, block in enumerate(blocks):
        next_one = number + 1 if number + 1 < len(blocks) else None
        for node in block:
            own = next_one if node is block[-1] else number
            if any(inside.get(user) != own for user in node.users):
                return False
    return True
