"""spx.shard: every rank takes its part of a value that all ranks hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, rank_in, with_size
from spcompile.machine import sequence

SCHEMA = "shard(Tensor x, int dim, str axis, int degree, str order, float? fill) -> Tensor"

DRAWING = """\
rank 0   [a b c d e]        [a b]
rank 1   [a b c d e]   ->   [c d]
rank 2   [a b c d e]        [e fill], or [e e]"""


def fake(x: Tensor, dim: int, axis: str, degree: int, order: str, fill: float | None) -> Tensor:
    return x.new_empty(with_size(x.shape, dim, sequence.local_length(x.shape[dim], degree, order)))


def spec(parts: Sequence[Tensor], dim: int, axis: str, degree: int, order: str, fill: float | None) -> list[Tensor]:
    return [packed(sequence.take(x, dim, rank, degree, order, fill)) for rank, x in enumerate(parts)]


def eager(x: Tensor, dim: int, axis: str, degree: int, order: str, fill: float | None) -> Tensor:
    """As sequence.take, but without a padded copy of the whole of `x`."""
    length = x.shape[dim]
    chunk = sequence.chunk_length(length, degree, order)
    out = x.new_empty(with_size(x.shape, dim, sequence.local_length(length, degree, order)))
    out.copy_(x.narrow(dim, length - 1, 1).detach()) if fill is None else out.fill_(fill)
    for i, c in enumerate(sequence.chunks_of(rank_in(axis), degree, order)):
        present = min(chunk, length - c * chunk)
        if present > 0:
            out.narrow(dim, i * chunk, present).copy_(x.narrow(dim, c * chunk, present))
    return out


def dual(x: Tensor, dim: int, axis: str, degree: int, order: str, fill: float | None) -> Call:
    arguments = {"dim": dim, "length": x.shape[dim], "axis": axis, "degree": degree, "order": order, "to": "I"}
    return Call(arguments, torch.ops.spx.all_gather.default)


def sent(x: Tensor, dim: int, axis: str, degree: int, order: str, fill: float | None) -> Size:
    return 0


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in sequence.ORDERS:
        for dim, shape in ((0, (length, 2)), (1, (2, length, 3))):
            yield Call({"dim": dim, "axis": "cp", "degree": degree, "order": order, "fill": 0.0}, shape=shape)


SHARD = define(
    SCHEMA,
    summary="Every rank takes its part of dim `dim`; padding is `fill`, or repeats the last element if None.",
    states={"": ("I", "S")},
    drawing=DRAWING,
    formula="0",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
