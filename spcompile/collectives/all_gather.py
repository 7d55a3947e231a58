"""spx.all_gather: all parts, on every rank, in natural order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, wait, with_size
from spcompile.collectives.gather_on_gloo import gather_start
from spcompile.machine import sequence

SCHEMA = "all_gather(Tensor x, int dim, SymInt length, str axis, int degree, str order, str to) -> Tensor"

DRAWING = """\
rank 0   [a b]        [a b c d e]
rank 1   [c d]   ->   [a b c d e]
rank 2   [e .]        [a b c d e]"""


def fake(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, to: str) -> Tensor:
    return x.new_empty(with_size(x.shape, dim, length))


def spec(parts: Sequence[Tensor], dim: int, length: Size, axis: str, degree: int, order: str, to: str) -> list[Tensor]:
    whole = sequence.restore_all(parts, dim, length, order)
    return [whole.clone(memory_format=torch.contiguous_format) for _ in parts]


def lowered(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, to: str) -> Tensor:
    start = torch.ops._c10d_functional.all_gather_into_tensor.default
    return _restored(start(x.contiguous(), degree, axis), x, dim, length, degree, order)


def eager(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, to: str) -> Tensor:
    return _restored(gather_start(x)(x.contiguous(), degree, axis), x, dim, length, degree, order)


def _restored(started: Tensor, x: Tensor, dim: int, length: Size, degree: int, order: str) -> Tensor:
    return packed(sequence.restore(wait(started).view([degree, *x.shape]), dim, length, order))


def dual(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, to: str) -> Call:
    arguments = {"dim": dim, "axis": axis, "degree": degree, "order": order}
    if to == "I":
        return Call({**arguments, "fill": 0.0}, torch.ops.spx.shard.default)
    return Call(arguments, torch.ops.spx.reduce_scatter.default)


def sent(x: Tensor, dim: int, length: Size, axis: str, degree: int, order: str, to: str) -> Size:
    return (degree - 1) * x.numel() * x.element_size()


def examples(length: int, degree: int) -> Iterator[Call]:
    for order in sequence.ORDERS:
        local = sequence.local_length(length, degree, order)
        for to, dim, shape in (("R", 0, (local, 2)), ("R", 1, (2, local, 3)), ("I", 2, (2, 1, local))):
            arguments = {"dim": dim, "length": length, "axis": "cp", "degree": degree, "order": order, "to": to}
            yield Call(arguments, shape=shape)


ALL_GATHER = define(
    SCHEMA,
    summary="Every rank gets all parts, in natural order and without padding: `length` elements along `dim`.",
    states={"R": ("S", "R"), "I": ("S", "I")},
    drawing=DRAWING,
    formula="(n - 1) * local",
    fake=fake,
    eager=eager,
    lowered=lowered,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
