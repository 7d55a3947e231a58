"""spx.move: elements of a sharded dim become those of another dim, with other neighbours and of another length.

What concatenation, slices, shifts and rolls along the sequence do. Each rank sends the others only what they are to
have; where all keep what they have, as in shifts by 0, nobody communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, with_size
from spcompile.collectives.exchanged import bytes_sent, exchanged, exchanged_by_all
from spcompile.machine.overlaps import LaidOut, MessagePlan

SCHEMA = (
    "move(Tensor x, int dim, SymInt start, SymInt count, SymInt length, SymInt unit, SymInt to_start, "
    "SymInt to_length, SymInt to_unit, str axis, int degree, str order) -> Tensor"
)

DRAWING = """\
rank 0    [a b c]        [0 0 a b]
rank 1    [d e .]   ->   [c d e .]"""


def _exchange(
    start: int, count: int, length: int, unit: int, to_start: int, to_length: int, to_unit: int, degree: int, order: str
) -> MessagePlan:
    old, new = LaidOut(length, unit, degree, order), LaidOut(to_length, to_unit, degree, order)
    return MessagePlan(old, new, start, to_start, count, degree)


def fake(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, to_start: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(with_size(x.shape, dim, LaidOut(to_length, to_unit, degree, order).local))


def spec(parts: Sequence[Tensor], dim: int, axis: str, **layouts: int | str) -> list[Tensor]:
    return exchanged_by_all(parts, dim, _exchange(**layouts))  # type: ignore[arg-type]


def eager(
    x: Tensor, dim: int, start: int, count: int, length: int, unit: int, to_start: int, to_length: int, to_unit: int,
    axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    plan = _exchange(start, count, length, unit, to_start, to_length, to_unit, degree, order)
    return exchanged(x, dim, plan, axis)


def dual(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, to_start: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Call:  # fmt: skip
    back = {"start": to_start, "length": to_length, "unit": to_unit}
    there = {"to_start": start, "to_length": length, "to_unit": unit}
    ranks = {"axis": axis, "degree": degree, "order": order}
    return Call({"dim": dim, "count": count, **back, **there, **ranks}, torch.ops.spx.move.default)


def sent(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, to_start: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Size:  # fmt: skip
    numbers = (start, count, length, unit, to_start, to_length, to_unit)
    return bytes_sent(x, dim, numbers, lambda: _exchange(*numbers, degree, order))


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in ("contiguous", "zigzag"):
        # (start, count, to_start, to_length): what follows 2 others; all but the first; the middle of a longer one
        for start, count, to, to_length in ((0, length, 2, length + 2), (1, length - 1, 0, length - 1), (1, 2, 3, 9)):
            for dim, unit, to_unit in ((0, 1, 1), (1, 3, 1), (1, 1, 2)):
                old, new = (
                    LaidOut(length, unit, degree, order),
                    LaidOut(-(-to_length // to_unit), to_unit, degree, order),
                )
                layouts = {"length": old.length, "unit": unit, "to_length": new.length, "to_unit": to_unit}
                span = {"start": start, "count": count, "to_start": to}
                shape = (old.local, 2) if dim == 0 else (2, old.local)
                ranks = {"axis": "cp", "degree": degree, "order": order}
                yield Call({"dim": dim, **span, **layouts, **ranks}, shape=shape)


MOVE = define(
    SCHEMA,
    summary="Elements `start` to `start + count` of one dim become those from `to_start` on of another; the rest is 0.",
    states={"": ("S", "S")},
    drawing=DRAWING,
    formula="what other ranks get, at most local",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
