"""spx.move: elements of a sharded dim become those of another dim, with other neighbours and of another length.

What concatenation, slices, shifts and rolls along the sequence do. Each rank sends the others only what they are to
have; where all keep what they have, as in shifts by 0, nobody communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Call, Size, copy_overlaps, define, rank_in, wait, with_size
from spcompile.machine.overlaps import LaidOut, Overlap, overlaps

SCHEMA = (
    "move(Tensor x, int dim, SymInt start, SymInt count, SymInt length, SymInt unit, SymInt to_start, "
    "SymInt to_length, SymInt to_unit, str axis, int degree, str order) -> Tensor"
)

DRAWING = """\
rank 0    [a b c]        [0 0 a b]
rank 1    [d e .]   ->   [c d e .]"""


class _Plan:
    """What every rank sends every other."""

    def __init__(
        self, start: int, count: int, length: int, unit: int, to_start: int, to_length: int, to_unit: int, degree: int,
        order: str,
    ) -> None:  # fmt: skip
        self.old, self.new = LaidOut(length, unit, degree, order), LaidOut(to_length, to_unit, degree, order)
        self.span = (start, to_start, count)

    def between(self, source: int, target: int) -> list[Overlap]:
        """From rank to rank, ascending."""
        return overlaps(self.old.stretches(source), self.new.stretches(target), *self.span)

    def sent(self, rank: int) -> int:
        """Elements that leave a rank."""
        others = (r for r in range(self.old.degree) if r != rank)
        return sum(piece.size for other in others for piece in self.between(rank, other))


def fake(
    x: Tensor, dim: int, start: Size, count: Size, length: Size, unit: Size, to_start: Size, to_length: Size,
    to_unit: Size, axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(with_size(x.shape, dim, LaidOut(to_length, to_unit, degree, order).local))


def spec(parts: Sequence[Tensor], dim: int, axis: str, **layouts: int | str) -> list[Tensor]:
    plan = _Plan(**layouts)  # type: ignore[arg-type]
    results = [x.new_zeros(with_size(x.shape, dim, plan.new.local)) for x in parts]
    for source, x in enumerate(parts):
        for target, result in enumerate(results):
            copy_overlaps(result, x, dim, plan.between(source, target))
    return results


def eager(
    x: Tensor, dim: int, start: int, count: int, length: int, unit: int, to_start: int, to_length: int, to_unit: int,
    axis: str, degree: int, order: str,
) -> Tensor:  # fmt: skip
    rank = rank_in(axis)
    plan = _Plan(start, count, length, unit, to_start, to_length, to_unit, degree, order)
    out = x.new_zeros(with_size(x.shape, dim, plan.new.local))
    copy_overlaps(out, x, dim, plan.between(rank, rank))
    if any(plan.sent(other) for other in range(degree)):
        _exchange(x.movedim(dim, 0), out.movedim(dim, 0), plan, rank, axis)
    return out


def _exchange(x: Tensor, out: Tensor, plan: _Plan, rank: int, axis: str) -> None:
    """What other ranks have or are to have. Along dim 0."""
    others = [peer if peer != rank else None for peer in range(plan.old.degree)]
    sends = [plan.between(rank, peer) if peer is not None else [] for peer in others]
    receives = [plan.between(peer, rank) if peer is not None else [] for peer in others]
    rows = [x.narrow(0, piece.source, piece.size) for to_peer in sends for piece in to_peer]
    message = torch.cat([x.narrow(0, 0, 0), *rows])
    is_bool = message.dtype is torch.bool
    arrived = wait(
        torch.ops._c10d_functional.all_to_all_single.default(
            message.view(torch.uint8) if is_bool else message, _sizes(receives), _sizes(sends), axis
        )
    )
    first = 0
    for piece in (piece for from_peer in receives for piece in from_peer):
        out.narrow(0, piece.target, piece.size).copy_(arrived.narrow(0, first, piece.size))
        first += piece.size


def _sizes(by_peer: list[list[Overlap]]) -> list[int]:
    return [sum(piece.size for piece in of_peer) for of_peer in by_peer]


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
    if not all(isinstance(number, int) for number in numbers):
        return x.numel() * x.element_size()
    plan = _Plan(*numbers, degree, order)
    most = max(plan.sent(rank) for rank in range(degree))
    return x.numel() // x.shape[dim] * most * x.element_size()


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
