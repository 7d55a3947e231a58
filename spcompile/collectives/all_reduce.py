"""spx.all_reduce: the sum over ranks, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, wait

SCHEMA = "all_reduce(Tensor x, str axis, int degree, str to) -> Tensor"

DRAWING = """\
rank 0   [a0 b0] +        [a b]
rank 1   [a1 b1] +   ->   [a b]        a = a0 + a1 + a2
rank 2   [a2 b2] +        [a b]"""


def fake(x: Tensor, axis: str, degree: int, to: str) -> Tensor:
    return x.new_empty(x.shape)


def spec(parts: Sequence[Tensor], axis: str, degree: int, to: str) -> list[Tensor]:
    whole = torch.stack(list(parts)).sum(0).to(parts[0].dtype)
    return [whole.clone() for _ in parts]


def lowered(x: Tensor, axis: str, degree: int, to: str) -> Tensor:
    return wait(torch.ops._c10d_functional.all_reduce.default(packed(x), "sum", axis))


def dual(x: Tensor, axis: str, degree: int, to: str) -> Call:
    if to == "I":
        return Call({"axis": axis, "degree": degree}, torch.ops.spx.vary.default)
    return Call({"axis": axis, "degree": degree, "to": "R"}, torch.ops.spx.all_reduce.default)


def sent(x: Tensor, axis: str, degree: int, to: str) -> Size:
    return 2 * (degree - 1) * x.numel() * x.element_size() // degree


def examples(length: int, degree: int) -> Iterator[Call]:
    for to, shape in (("I", (2, length)), ("R", (length, 3)), ("I", ())):
        yield Call({"axis": "cp", "degree": degree, "to": to}, shape=shape)


ALL_REDUCE = define(
    SCHEMA,
    summary="The sum over ranks, on every rank.",
    states={"I": ("P", "I"), "R": ("P", "R")},
    drawing=DRAWING,
    formula="2 * (n - 1) / n * full",
    fake=fake,
    lowered=lowered,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
