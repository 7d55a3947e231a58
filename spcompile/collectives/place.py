"""spx.place: a value that all ranks hold becomes some elements of a sharded dim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, copy_overlaps, define, rank_in, with_size
from spcompile.machine.overlaps import LaidOut, everything, overlaps

SCHEMA = "place(Tensor x, int dim, SymInt start, SymInt length, SymInt unit, str axis, int degree, str order) -> Tensor"

DRAWING = """\
rank 0    [a b]        [0 a]
rank 1    [a b]   ->   [b 0]
rank 2    [a b]        [0 .]"""


def fake(x: Tensor, dim: int, start: Size, length: Size, unit: Size, axis: str, degree: int, order: str) -> Tensor:
    return x.new_empty(with_size(x.shape, dim, LaidOut(length, unit, degree, order).local))


def spec(parts: Sequence[Tensor], dim: int, axis: str, **layout: int | str) -> list[Tensor]:
    return [_placed(x, rank, dim, **layout) for rank, x in enumerate(parts)]  # type: ignore[arg-type]


def eager(x: Tensor, dim: int, start: int, length: int, unit: int, axis: str, degree: int, order: str) -> Tensor:
    return _placed(x, rank_in(axis), dim, start, length, unit, degree, order)


def _placed(x: Tensor, rank: int, dim: int, start: int, length: int, unit: int, degree: int, order: str) -> Tensor:
    split, size = LaidOut(length, unit, degree, order), x.shape[dim]
    out = x.new_zeros(with_size(x.shape, dim, split.local))
    copy_overlaps(out, x, dim, overlaps(everything(size), split.stretches(rank), 0, start, size))
    return out


def dual(x: Tensor, dim: int, start: Size, length: Size, unit: Size, axis: str, degree: int, order: str) -> Call:
    layout = {"length": length, "unit": unit, "axis": axis, "degree": degree, "order": order}
    return Call({"dim": dim, "start": start, "count": x.shape[dim], **layout}, torch.ops.spx.pick.default)


def sent(x: Tensor, dim: int, start: Size, length: Size, unit: Size, axis: str, degree: int, order: str) -> Size:
    return 0


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in ("contiguous", "zigzag"):
        for dim, start, unit, shape in ((0, 0, 1, (1, 3)), (1, 1, 1, (2, length - 1)), (1, 3, 2, (2, 4, 3))):
            layout = {"length": length, "unit": unit, "axis": "cp", "degree": degree, "order": order}
            yield Call({"dim": dim, "start": start, **layout}, shape=shape)


PLACE = define(
    SCHEMA,
    summary="What all ranks hold becomes the elements from `start` on of a sharded dim; the rest is 0.",
    states={"": ("R", "S")},
    drawing=DRAWING,
    formula="0",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
