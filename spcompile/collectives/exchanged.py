"""What `move`, `halo` and `halo_sum` have in common: elements of a dim go to the ranks that are to hold them.

Each rank sends the others only what they are to have; where all keep what they have, nobody communicates. What arrives
at one element more than once is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from spcompile.collectives.collective import Size, copy_overlaps, rank_in, wait, with_size
from spcompile.machine.overlaps import MessagePlan, Overlap


def exchanged_by_all(parts: Sequence[Tensor], dim: int, plan: MessagePlan, *, adds: bool = False) -> list[Tensor]:
    """All ranks' results from all ranks' operands. adds: some elements may arrive at one place."""
    put = _add_overlaps if adds else copy_overlaps
    results = [x.new_zeros(with_size(x.shape, dim, plan.new.local)) for x in parts]
    for source, x in enumerate(parts):
        for target, result in enumerate(results):
            put(result, x, dim, plan.between(source, target))
    return results


def exchanged(x: Tensor, dim: int, plan: MessagePlan, axis: str, *, adds: bool = False) -> Tensor:
    """This rank's result. adds: as above."""
    rank, put = rank_in(axis), _add_overlaps if adds else copy_overlaps
    out = x.new_zeros(with_size(x.shape, dim, plan.new.local))
    put(out, x, dim, plan.between(rank, rank))
    if any(plan.sent(other) for other in range(plan.degree)):
        rows, (arrived, pieces) = out.movedim(dim, 0), _messages(x.movedim(dim, 0), plan, rank, axis)
        first = 0
        for piece in pieces:
            put(rows, arrived, 0, [Overlap(first, piece.target, piece.size)])
            first += piece.size
    return out


def bytes_sent(x: Tensor, dim: int, numbers: Iterable[Size], plan: Callable[[], MessagePlan]) -> Size:
    """Bytes that the rank sends that sends most; of `numbers` that are symbols at most its part."""
    if not all(isinstance(number, int) for number in numbers):
        return x.numel() * x.element_size()
    return x.numel() // x.shape[dim] * plan().most_sent * x.element_size()


def _messages(x: Tensor, plan: MessagePlan, rank: int, axis: str) -> tuple[Tensor, list[Overlap]]:
    """What other ranks have for this one, end to end along dim 0, and where each piece of it belongs."""
    others = [peer if peer != rank else None for peer in range(plan.degree)]
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
    return arrived.view(message.dtype), [piece for from_peer in receives for piece in from_peer]


def _sizes(by_peer: list[list[Overlap]]) -> list[int]:
    return [sum(piece.size for piece in of_peer) for of_peer in by_peer]


def _add_overlaps(out: Tensor, x: Tensor, dim: int, pieces: Iterable[Overlap]) -> None:
    for piece in pieces:
        out.narrow(dim, piece.target, piece.size).add_(x.narrow(dim, piece.source, piece.size))
