"""spx.pick: some elements of a sharded dim, on every rank those that it has: the sum over ranks has all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, copy_overlaps, define, rank_in, with_size
from spcompile.machine.overlaps import LaidOut, everything, overlaps

SCHEMA = (
    "pick(Tensor x, int dim, SymInt start, SymInt count, SymInt length, SymInt unit, str axis, int degree, str order) "
    "-> Tensor"
)

DRAWING = """\
rank 0    [a b]        [b 0]
rank 1    [c d]   ->   [0 c]        their sum: [b c]
rank 2    [e .]        [0 0]"""


def fake(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, axis: str, degree: int, order: str
) -> Tensor:
    return x.new_empty(with_size(x.shape, dim, count))


def spec(parts: Sequence[Tensor], dim: int, axis: str, **layout: int | str) -> list[Tensor]:
    return [_picked(x, rank, dim, **layout) for rank, x in enumerate(parts)]  # type: ignore[arg-type]


def eager(
    x: Tensor, dim: int, start: int, count: int, length: int, unit: int, axis: str, degree: int, order: str
) -> Tensor:
    return _picked(x, rank_in(axis), dim, start, count, length, unit, degree, order)


def _picked(
    x: Tensor, rank: int, dim: int, start: int, count: int, length: int, unit: int, degree: int, order: str
) -> Tensor:
    out = x.new_zeros(with_size(x.shape, dim, count))
    held = LaidOut(length, unit, degree, order).stretches(rank)
    copy_overlaps(out, x, dim, overlaps(held, everything(count), start, 0, count))
    return out


def dual(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, axis: str, degree: int, order: str
) -> Call:
    layout = {"length": length, "unit": unit, "axis": axis, "degree": degree, "order": order}
    return Call({"dim": dim, "start": start, **layout}, torch.ops.spx.place.default)


def sent(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, axis: str, degree: int, order: str
) -> Size:
    return 0


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in ("contiguous", "zigzag"):
        for dim, start, count, unit in ((0, 0, 1, 1), (1, 1, length - 1, 1), (1, 3, 4, 2)):
            local = LaidOut(length, unit, degree, order).local
            layout = {"length": length, "unit": unit, "axis": "cp", "degree": degree, "order": order}
            yield Call({"dim": dim, "start": start, "count": count, **layout}, shape=((2,) * dim + (local, 3)))


PICK = define(
    SCHEMA,
    summary="Elements `start` to `start + count` of a sharded dim, 0 where another rank has them.",
    states={"": ("S", "P")},
    drawing=DRAWING,
    formula="0",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
