"""spx.all_to_all: block i of every rank goes to rank i.

`recompute` is about memory, not about values: the backward makes the all-to-all again instead of keeping its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, wait

SCHEMA = "all_to_all(Tensor x, str axis, int degree, bool recompute=False) -> Tensor"

DRAWING = """\
rank 0   [a0 a1 a2]        [a0 b0 c0]
rank 1   [b0 b1 b2]   ->   [a1 b1 c1]
rank 2   [c0 c1 c2]        [a2 b2 c2]"""


def fake(x: Tensor, axis: str, degree: int, recompute: bool = False) -> Tensor:
    torch._check(x.shape[0] == degree, lambda: f"all_to_all: dim 0 has {x.shape[0]} blocks for {degree} ranks")
    return x.new_empty(x.shape)


def spec(parts: Sequence[Tensor], axis: str, degree: int, recompute: bool = False) -> list[Tensor]:
    return [torch.stack([x[rank] for x in parts]) for rank in range(degree)]


def lowered(x: Tensor, axis: str, degree: int, recompute: bool = False) -> Tensor:
    one_each = [1] * degree
    return wait(torch.ops._c10d_functional.all_to_all_single.default(packed(x), one_each, one_each, axis))


def dual(x: Tensor, axis: str, degree: int, recompute: bool = False) -> Call:
    return Call({"axis": axis, "degree": degree}, torch.ops.spx.all_to_all.default)


def sent(x: Tensor, axis: str, degree: int, recompute: bool = False) -> Size:
    return (degree - 1) * (x.numel() // degree) * x.element_size()


def examples(length: int, degree: int) -> Iterator[Call]:
    for shape in ((degree, length), (degree, 2, length)):
        yield Call({"axis": "cp", "degree": degree}, shape=shape)


ALL_TO_ALL = define(
    SCHEMA,
    summary="x is [degree, ...]: block i goes to rank i, and block i of the result came from rank i.",
    states={"": ("S", "S")},
    drawing=DRAWING,
    formula="(n - 1) / n * local",
    fake=fake,
    lowered=lowered,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
