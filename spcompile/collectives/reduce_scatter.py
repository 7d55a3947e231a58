"""spx.reduce_scatter: the sum over ranks, of which every rank keeps its part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, wait, with_size
from spcompile.machine import sequence

SCHEMA = "reduce_scatter(Tensor x, int dim, str axis, int degree, str order) -> Tensor"

DRAWING = """\
rank 0   [a0 b0 c0 d0 e0] +        [a b]
rank 1   [a1 b1 c1 d1 e1] +   ->   [c d]        a = a0 + a1 + a2
rank 2   [a2 b2 c2 d2 e2] +        [e 0]"""


def fake(x: Tensor, dim: int, axis: str, degree: int, order: str) -> Tensor:
    return x.new_empty(with_size(x.shape, dim, sequence.local_length(x.shape[dim], degree, order)))


def spec(parts: Sequence[Tensor], dim: int, axis: str, degree: int, order: str) -> list[Tensor]:
    whole = torch.stack(list(parts)).sum(0).to(parts[0].dtype)
    return [packed(sequence.take(whole, dim, rank, degree, order)) for rank in range(degree)]


def lowered(x: Tensor, dim: int, axis: str, degree: int, order: str) -> Tensor:
    stacked = packed(sequence.split(x, dim, degree, order))
    start = torch.ops._c10d_functional.reduce_scatter_tensor.default
    return wait(start(stacked, "sum", degree, axis)).view(stacked.shape[1:])


def dual(x: Tensor, dim: int, axis: str, degree: int, order: str) -> Call:
    arguments = {"dim": dim, "length": x.shape[dim], "axis": axis, "degree": degree, "order": order, "to": "R"}
    return Call(arguments, torch.ops.spx.all_gather.default)


def sent(x: Tensor, dim: int, axis: str, degree: int, order: str) -> Size:
    local = sequence.local_length(x.shape[dim], degree, order)
    elements: Size = degree - 1
    for size in with_size(x.shape, dim, local):
        elements = elements * size
    return elements * x.element_size()


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in sequence.ORDERS:
        for dim, shape in ((0, (length,)), (1, (2, length, 3))):
            yield Call({"dim": dim, "axis": "cp", "degree": degree, "order": order}, shape=shape)


REDUCE_SCATTER = define(
    SCHEMA,
    summary="The sum over ranks; every rank keeps its part of dim `dim`, padded with 0.",
    states={"": ("P", "S")},
    drawing=DRAWING,
    formula="(n - 1) / n * full, of the padded tensor",
    fake=fake,
    lowered=lowered,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
