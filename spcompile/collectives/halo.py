"""spx.halo: a sharded dim becomes the windows of it that another sharded dim is made of.

What a convolution along the sequence reads: of each of its chunks of the result a rank holds all that the chunk is made
of, its own elements and some of its neighbours'. Zeros stand beyond both ends of the dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, with_size
from spcompile.collectives.exchanged import bytes_sent, exchanged, exchanged_by_all
from spcompile.machine.overlaps import LaidOut, MessagePlan, Windows

SCHEMA = (
    "halo(Tensor x, int dim, SymInt count, SymInt length, SymInt unit, SymInt step, SymInt before, SymInt extent, "
    "SymInt to_length, SymInt to_unit, str axis, int degree, str order) -> Tensor"
)

DRAWING = """\
rank 0    [a b]        [0 a b c]
rank 1    [c d]   ->   [b c d e]
rank 2    [e .]        [d e 0 0]"""


def windows_of_elements(
    count: int, length: int, unit: int, step: int, before: int, extent: int, to_length: int, to_unit: int, degree: int,
    order: str,
) -> MessagePlan:  # fmt: skip
    """From a dim of `count` elements that is laid out to the windows of it; the arguments are those of the op."""
    made = LaidOut(to_length, to_unit, degree, order)
    return MessagePlan(LaidOut(length, unit, degree, order), Windows(made, step, before, extent), 0, 0, count, degree)


def fake(
    x: Tensor, dim: int, count: Size, length: Size, unit: Size, step: Size, before: Size, extent: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    windows = Windows(LaidOut(to_length, to_unit, degree, order), step, before, extent)
    return x.new_empty(with_size(x.shape, dim, windows.local))


def spec(parts: Sequence[Tensor], dim: int, axis: str, **layouts: int | str) -> list[Tensor]:
    return exchanged_by_all(parts, dim, windows_of_elements(**layouts))  # type: ignore[arg-type]


def eager(
    x: Tensor, dim: int, count: int, length: int, unit: int, step: int, before: int, extent: int, to_length: int,
    to_unit: int, axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    plan = windows_of_elements(count, length, unit, step, before, extent, to_length, to_unit, degree, order)
    return exchanged(x, dim, plan, axis)


def dual(x: Tensor, **arguments: Size | str) -> Call:
    return Call(arguments, torch.ops.spx.halo_sum.default)


def sent(
    x: Tensor, dim: int, count: Size, length: Size, unit: Size, step: Size, before: Size, extent: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Size:  # fmt: skip
    numbers = (count, length, unit, step, before, extent, to_length, to_unit)
    return bytes_sent(x, dim, numbers, lambda: windows_of_elements(*numbers, degree, order))


def layouts(length: int, degree: int) -> Iterator[dict[str, Any]]:
    """Examples of the arguments: of a centred window, a causal one with gaps, steps of 2, and an image by its rows."""
    for order in ("contiguous", "zigzag"):
        for unit, step, before, extent, made in (
            (1, 1, 1, 3, length),
            (1, 1, 4, 5, length),
            (1, 2, 1, 2, 0),
            (3, 3, 0, 3, 0),
        ):
            count = length * unit
            to_length = made or (count + before - extent) // step + 1
            layout = {"count": count, "length": length, "unit": unit, "step": step, "before": before, "extent": extent}
            for dim in (0, 1):
                yield {
                    "dim": dim,
                    **layout,
                    "to_length": to_length,
                    "to_unit": 1,
                    "axis": "cp",
                    "degree": degree,
                    "order": order,
                }


def examples(length: int, degree: int) -> Iterator[Call]:
    for arguments in layouts(length, degree):
        local = LaidOut(length, arguments["unit"], degree, arguments["order"]).local
        yield Call(arguments, shape=(local, 2) if arguments["dim"] == 0 else (2, local))


HALO = define(
    SCHEMA,
    summary="The windows of a sharded dim that another one is made of: what a rank has, and some of its neighbours'.",
    states={"": ("S", "S")},
    drawing=DRAWING,
    formula="what other ranks get, at most what windows hold",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
