"""spx.reorder: the same shard of a dim in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, define, packed, rank_in, wait, with_size
from spcompile.machine import sequence

SCHEMA = "reorder(Tensor x, int dim, SymInt length, str axis, int degree, str from_order, str to_order) -> Tensor"

DRAWING = """\
          contiguous        zigzag
rank 0    [a b c d]         [a b k l]
rank 1    [e f g h]    ->   [c d i j]
rank 2    [i j k l]         [e f g h]"""


def fake(x: Tensor, dim: int, length: Size, axis: str, degree: int, from_order: str, to_order: str) -> Tensor:
    return x.new_empty(with_size(x.shape, dim, sequence.local_length(length, degree, to_order)))


def spec(
    parts: Sequence[Tensor], dim: int, length: Size, axis: str, degree: int, from_order: str, to_order: str
) -> list[Tensor]:
    whole = sequence.restore_all(parts, dim, length, from_order)
    return [packed(sequence.take(whole, dim, rank, degree, to_order)) for rank in range(degree)]


def eager(x: Tensor, dim: int, length: Size, axis: str, degree: int, from_order: str, to_order: str) -> Tensor:
    """Each rank sends every other only what that one holds in the new order: no padding, at most its whole part."""
    rank = rank_in(axis)
    sends = [_common(rank, from_order, peer, to_order, length, degree) for peer in range(degree)]
    receives = [_common(peer, from_order, rank, to_order, length, degree) for peer in range(degree)]
    rows = x.movedim(dim, 0)
    pieces = [rows.narrow(0, start, size) for pieces in sends for start, _, size in pieces]
    arrived = wait(
        torch.ops._c10d_functional.all_to_all_single.default(
            torch.cat([rows.narrow(0, 0, 0), *pieces]), _piece_sizes(receives), _piece_sizes(sends), axis
        )
    )
    local = sequence.local_length(length, degree, to_order)
    out = x.new_zeros(with_size(x.shape, dim, local))
    arriving = [piece for pieces in receives for piece in pieces]
    blocks = arrived.split([size for _, _, size in arriving]) if arriving else ()
    for (_, start, size), block in zip(arriving, blocks, strict=True):
        out.movedim(dim, 0).narrow(0, start, size).copy_(block)
    return out


def _piece_sizes(plan: list[list[tuple[int, int, int]]]) -> list[int]:
    return [sum(size for _, _, size in pieces) for pieces in plan]


def _common(
    source: int, from_order: str, target: int, to_order: str, length: int, degree: int
) -> list[tuple[int, int, int]]:
    """What `source` holds before and `target` after: (start in source, start in target, size), ascending."""
    pieces = []
    old, new = sequence.chunk_length(length, degree, from_order), sequence.chunk_length(length, degree, to_order)
    for i, c in enumerate(sequence.chunks_of(source, degree, from_order)):
        for j, d in enumerate(sequence.chunks_of(target, degree, to_order)):
            start, stop = max(c * old, d * new), min((c + 1) * old, (d + 1) * new, length)
            if start < stop:
                pieces.append((i * old + start - c * old, j * new + start - d * new, stop - start))
    return pieces


def dual(x: Tensor, dim: int, length: Size, axis: str, degree: int, from_order: str, to_order: str) -> Call:
    arguments = {"dim": dim, "length": length, "axis": axis, "degree": degree}
    return Call({**arguments, "from_order": to_order, "to_order": from_order}, torch.ops.spx.reorder.default)


def sent(x: Tensor, dim: int, length: Size, axis: str, degree: int, from_order: str, to_order: str) -> Size:
    return x.numel() * x.element_size()


def examples(length: int, degree: int) -> Iterator[Call]:
    for old, new in (("contiguous", "zigzag"), ("zigzag", "contiguous")):
        local = sequence.local_length(length, degree, old)
        for dim, shape in ((0, (local, 2)), (1, (2, local))):
            orders = {"from_order": old, "to_order": new}
            arguments = {"dim": dim, "length": length, "axis": "cp", "degree": degree, **orders}
            yield Call(arguments, shape=shape)


REORDER = define(
    SCHEMA,
    summary="From one order of the sequence to another; new padding is 0.",
    states={"": ("S", "S")},
    drawing=DRAWING,
    formula="at most local",
    fake=fake,
    eager=eager,
    spec=spec,
    sent=sent,
    dual=dual,
    examples=examples,
)
