"""spx.halo_sum: windows of a sharded dim become the dim again; what several windows hold of one element is added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, with_size
from spcompile.collectives.exchanged import bytes_sent, exchanged, exchanged_by_all
from spcompile.collectives.halo import layouts, windows_of_elements
from spcompile.machine.overlaps import LaidOut, MessagePlan, Windows

SCHEMA = (
    "halo_sum(Tensor x, int dim, SymInt count, SymInt length, SymInt unit, SymInt step, SymInt before, SymInt extent, "
    "SymInt to_length, SymInt to_unit, str axis, int degree, str order) -> Tensor"
)

DRAWING = """\
rank 0    [. a b c]        [a    b+d]
rank 1    [d e f g]   ->   [c+e  f+h]
rank 2    [h i . .]        [g+i    0]"""


def _elements_of_windows(
    count: int, length: int, unit: int, step: int, before: int, extent: int, to_length: int, to_unit: int, degree: int,
    order: str,
) -> MessagePlan:  # fmt: skip
    there = windows_of_elements(count, length, unit, step, before, extent, to_length, to_unit, degree, order)
    return MessagePlan(there.new, there.old, 0, 0, count, degree)


def fake(
    x: Tensor, dim: int, count: Size, length: Size, unit: Size, step: Size, before: Size, extent: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(with_size(x.shape, dim, LaidOut(length, unit, degree, order).local))


def spec(parts: Sequence[Tensor], dim: int, axis: str, **layouts: int | str) -> list[Tensor]:
    return exchanged_by_all(parts, dim, _elements_of_windows(**layouts), adds=True)  # type: ignore[arg-type]


def eager(
    x: Tensor, dim: int, count: int, length: int, unit: int, step: int, before: int, extent: int, to_length: int,
    to_unit: int, axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    plan = _elements_of_windows(count, length, unit, step, before, extent, to_length, to_unit, degree, order)
    return exchanged(x, dim, plan, axis, adds=True)


def dual(x: Tensor, **arguments: Size | str) -> Call:
    return Call(arguments, torch.ops.spx.halo.default)


def sent(
    x: Tensor, dim: int, count: Size, length: Size, unit: Size, step: Size, before: Size, extent: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Size:  # fmt: skip
    numbers = (count, length, unit, step, before, extent, to_length, to_unit)
    return bytes_sent(x, dim, numbers, lambda: _elements_of_windows(*numbers, degree, order))


def examples(length: int, degree: int) -> Iterator[Call]:
    for found in layouts(length, degree):
        ranks = LaidOut(found["to_length"], 1, degree, found["order"])
        local = Windows(ranks, found["step"], found["before"], found["extent"]).local
        yield Call(found, shape=(local, 2) if found["dim"] == 0 else (2, local))


HALO_SUM = define(
    SCHEMA,
    summary="Windows of a sharded dim become the dim: what they hold of one element is added up.",
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
