"""bucket-collectives: what is sent for parameters travels together, axis by axis.

Before: one collective per parameter. After: one per bucket, over what all of its members send laid end to end:
    all-reduces     flat = cat(g1.flatten(), g2.flatten()); sum = all_reduce(flat); g1', g2' = split(sum)
    reduce-scatters and all-gathers (ZeRO-3) the same with one row for each rank
Buckets of gradients close in the order in which the backward makes them, so that an early bucket travels while later
ones are still computed (Li et al. 2020, PyTorch Distributed, section 3.2); buckets of gathered parameters close in the
order of their uses. What fills a bucket alone travels alone, uncopied.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.collectives import call_arguments
from spcompile.collectives.collective import packed
from spcompile.collectives.typed_calls import AllGatherCall
from spcompile.graph.sizes import numel_hint
from spcompile.graph.splice import splice
from spcompile.graph.typed_call import value_of
from spcompile.machine import sequence
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.links import link_of
from spcompile.memory.joint import ancestors
from spcompile.passes_api import Context, Example, Pass, Stage

spx = torch.ops.spx
MEBIBYTE = 2**20
BYTES_TO_LATENCY = 10  # how much longer the bytes of a full bucket take than its chain of messages


@dataclass(frozen=True)
class BucketCollectives(Pass):
    """Fuse collectives whose results only leave the graph, and gathers of the graph's parameters.

    bucket_mib: a bucket is closed when it holds this many MiB, counted on one rank, or before: when its messages take
        most of their time for bytes, by the table of links. The last bucket of a backward has nothing to hide behind.
    """

    name: ClassVar[str] = "bucket-collectives"
    stage: ClassVar[Stage] = Stage.SCHEDULE
    summary: ClassVar[str] = "fuses what is sent for parameters and their gradients into buckets"

    bucket_mib: float = 25.0

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Fuse; returns the number of collectives that were replaced."""
        count = 0
        for bucket in list(self._buckets(gm.graph, ctx)):
            _fuse(bucket, ctx.traced)
            count += len(bucket)
        return count

    def _limit(self, axis: str, ctx: Context) -> float:
        """Bytes of a full bucket on an axis."""
        link = link_of(ctx.mesh, axis, ctx.options.links, own=ACCELERATORS[ctx.options.accelerator].links)
        latency = max(1, ctx.mesh.size(axis) - 1) * link.seconds_per_message
        return min(self.bucket_mib * MEBIBYTE, BYTES_TO_LATENCY * latency * link.bytes_per_second)

    def _buckets(self, graph: fx.Graph, ctx: Context) -> Iterator[list[fx.Node]]:
        """Runs of collectives of one kind, axis and dtype, in order, of at least two members."""
        open_buckets: dict[tuple[object, ...], list[fx.Node]] = {}
        for node in graph.nodes:
            if not (_leaves_graph(node) or _gathers_parameter(node)):
                continue
            x, named = call_arguments(node.target, node.args, node.kwargs)
            operand = value_of(x)
            limit = self._limit(named["axis"], ctx)
            if _message_bytes(node) >= limit:
                continue
            key = (node.target, named["axis"], named["degree"], named.get("to"), operand.dtype, operand.device)
            bucket = open_buckets.setdefault(key, [])
            bucket.append(node)
            if sum(map(_message_bytes, bucket)) >= limit:
                if len(bucket) > 1:
                    yield list(bucket)
                bucket.clear()
        yield from (bucket for bucket in open_buckets.values() if len(bucket) > 1)


def _operand(node: fx.Node) -> Any:
    return call_arguments(node.target, node.args, node.kwargs)[0]  # type: ignore[arg-type]


def _message_bytes(node: fx.Node) -> int:
    """Of the larger of what a collective reads and what it gives."""
    values = [node.meta["val"], value_of(_operand(node))]
    return max(numel_hint(value) * value.element_size() for value in values)


def _leaves_graph(node: fx.Node) -> bool:
    """A sum whose result is read by nobody but the output: a complete gradient, or a part of one."""
    sums = (spx.all_reduce.default, spx.reduce_scatter.default)
    return node.target in sums and all(user.op == "output" for user in node.users)


def _gathers_parameter(node: fx.Node) -> bool:
    """A gather of an input of the whole program, or of a view of it."""
    if not AllGatherCall.is_call(node) or not isinstance(AllGatherCall.of(node).length, int):
        return False
    source = _chain(node)[-1].args[0]
    return isinstance(source, fx.Node) and source.op == "placeholder" and source.name.startswith(("primals", "arg"))


def _chain(node: fx.Node) -> list[fx.Node]:
    """A call and the calls of one operand that lead to it, back to an input or to what has several operands."""
    found = [node]
    while isinstance(found[-1].args[0], fx.Node) and len(found[-1].args[0].all_input_nodes) == 1:
        found.append(found[-1].args[0])
    return found


@dataclass(frozen=True)
class _Fused:
    """The collectives of a bucket as one function of their operands."""

    kind: Any
    calls: tuple[tuple[tuple[str, Any], ...], ...]  # the named arguments of each

    def __call__(self, *parts: Tensor) -> list[Tensor]:
        function: Callable[..., list[Tensor]] = {
            spx.all_reduce.default: _reduced,
            spx.reduce_scatter.default: _scattered,
            spx.all_gather.default: _gathered,
        }[self.kind]
        return function([dict(call) for call in self.calls], parts)


def _fuse(bucket: list[fx.Node], traced: dict[Any, fx.Graph]) -> None:
    kind: Any = bucket[0].target
    is_gather = kind is spx.all_gather.default
    at = {node: number for number, node in enumerate(bucket[0].graph.nodes)}
    bucket = sorted(bucket, key=at.__getitem__)  # another bucket may have moved some of them up, in front of its own
    place = bucket[0] if is_gather else bucket[-1]
    if is_gather:  # its readers stand between the members: what the others read comes to the first
        above = set(itertools.takewhile(lambda node: node is not place, place.graph.nodes))
        for node in sorted(ancestors(bucket[1:]).difference(above, bucket), key=at.__getitem__):
            place.prepend(node)
    calls = tuple(tuple(call_arguments(kind, node.args, node.kwargs)[1].items()) for node in bucket)
    operands = [_operand(node) for node in bucket]
    results = splice(_Fused(kind, calls), operands, like=place, pre_dispatch=False, traced=traced)
    for node, result in zip(bucket, results, strict=True):
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)


def _reduced(calls: list[dict[str, Any]], parts: tuple[Tensor, ...]) -> list[Tensor]:
    flat = torch.cat([x.reshape(-1) for x in parts])
    total = spx.all_reduce(flat, *calls[-1].values())
    pieces = total.split([x.numel() for x in parts])
    return [piece.reshape(x.shape) for piece, x in zip(pieces, parts, strict=True)]


def _scattered(calls: list[dict[str, Any]], parts: tuple[Tensor, ...]) -> list[Tensor]:
    """A row for each rank: its parts of all members, end to end."""
    axis, degree = calls[0]["axis"], calls[0]["degree"]
    split = [sequence.split(x, call["dim"], degree, call["order"]) for x, call in zip(parts, calls, strict=True)]
    rows = torch.cat([x.reshape(degree, -1) for x in split], 1)
    mine = spx.reduce_scatter(rows, 0, axis, degree, "contiguous")[0]
    pieces = mine.split([x[0].numel() for x in split])
    return [piece.reshape(x.shape[1:]) for piece, x in zip(pieces, split, strict=True)]


def _gathered(calls: list[dict[str, Any]], parts: tuple[Tensor, ...]) -> list[Tensor]:
    axis, degree, to = (calls[0][name] for name in ("axis", "degree", "to"))
    mine = torch.cat([x.reshape(1, -1) for x in parts], 1)
    rows = spx.all_gather(mine, 0, degree, axis, degree, "contiguous", to)
    pieces = rows.split([x.numel() for x in parts], 1)
    return [
        packed(sequence.restore(piece.reshape(degree, *x.shape), call["dim"], call["length"], call["order"]))
        for piece, x, call in zip(pieces, parts, calls, strict=True)
    ]


def _attention_of_two_weights(x_BNSH: Tensor, q_HH: Tensor, k_HH: Tensor) -> Tensor:
    k_BNSH = x_BNSH @ k_HH
    return torch.nn.functional.scaled_dot_product_attention(x_BNSH @ q_HH, k_BNSH, k_BNSH)


def _inputs() -> tuple[Tensor, ...]:
    x_BNSH = torch.randn(1, 4, 7, 2, dtype=torch.float64)
    return x_BNSH, *(torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))


EXAMPLE = Example(_attention_of_two_weights, _inputs, options={"attention": "ring"})
