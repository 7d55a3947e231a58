"""spx.mask_padding: give the padding of a sharded dim a defined value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, rank_in
from spcompile.machine import sequence

SCHEMA = "mask_padding(Tensor x, int dim, SymInt length, str axis, int degree, str order, float fill) -> Tensor"

DRAWING = """\
rank 0   [a b]        [a b]
rank 1   [c d]   ->   [c d]
rank 2   [e .]        [e fill]"""


def fake(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, fill: float) -> Tensor:
    assert 0 <= dim < x.dim(), (dim, x.shape)
    return x.new_empty(x.shape)


def spec(
    parts: Sequence[Tensor], dim: int, length: Size, axis: str, degree: int, order: str, fill: float
) -> list[Tensor]:
    return [_masked(x, rank, dim, length, degree, order, fill) for rank, x in enumerate(parts)]


def eager(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, fill: float) -> Tensor:
    return _masked(x, rank_in(axis), dim, length, degree, order, fill)


def _masked(x: Tensor, rank: int, dim: int, length: Size, degree: int, order: str, fill: float) -> Tensor:
    # The dim may be laid out for a longer sequence of which `length` is the beginning: its capacity decides.
    padding = sequence.positions(x.shape[dim] * degree, rank, degree, order, x.device) >= length
    padding = padding.view([-1, *[1] * (x.dim() - dim - 1)])
    return packed(x.masked_fill(padding, fill))


def dual(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, fill: float) -> Call:
    arguments = {"dim": dim, "length": length, "axis": axis, "degree": degree, "order": order, "fill": 0.0}
    return Call(arguments, torch.ops.spx.mask_padding.default)


def sent(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, fill: float) -> Size:
    return 0


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in sequence.ORDERS:
        local = sequence.local_length(length, degree, order)
        for dim, shape in ((0, (local, 2)), (1, (2, local))):
            arguments = {"dim": dim, "length": length, "axis": "cp", "degree": degree, "order": order, "fill": 0.0}
            yield Call(arguments, shape=shape)


MASK_PADDING = define(
    SCHEMA,
    summary="Positions at or past `length` are set to `fill`, so that a reduction over `dim` may read them.",
    states={"": ("S", "S")},
    drawing=DRAWING,
    formula="0",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
