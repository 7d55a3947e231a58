"""How a dimension of `length` elements is laid out over the `degree` ranks of one mesh axis.

The dimension is padded at its end to a whole number of equal chunks. Rank r holds

    contiguous   chunk r                    of  degree   chunks
    zigzag       chunks r, 2*degree-1-r     of 2*degree  chunks   (causal work is equal on all ranks)

so every rank holds `local_length` elements, whatever `length` is. Positions at or past `length` are padding: their
values mean nothing, and whoever reduces over the dimension masks them first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Order = Literal["contiguous", "zigzag"]
ORDERS: tuple[Order, ...] = get_args(Order)


def chunks_per_rank(order: str) -> int:
    """1 for contiguous, 2 for zigzag."""
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; legal orders are {', '.join(ORDERS)}")
    return 2 if order == "zigzag" else 1


def chunk_length(length: int, degree: int, order: str) -> int:
    """Elements in one chunk: ceil(length / number of chunks). `length` may be a SymInt."""
    chunks = chunks_per_rank(order) * degree
    return (length + chunks - 1) // chunks


def local_length(length: int, degree: int, order: str) -> int:
    """Elements one rank holds, padding included. `length` may be a SymInt."""
    return chunks_per_rank(order) * chunk_length(length, degree, order)


def chunks_of(rank: int, degree: int, order: str) -> tuple[int, ...]:
    """The chunks that `rank` holds, in the order in which it holds them."""
    return (rank, 2 * degree - 1 - rank) if chunks_per_rank(order) == 2 else (rank,)


def positions(
    length: int, rank: int, degree: int, order: str, device: torch.device | str = "cpu", inner: int = 1
) -> Tensor:
    """Global position of every local element: int32 [inner * local_length]; entries >= length are padding.

    inner: the dimension is laid out over so many times more ranks, and `rank` holds what as many neighbours do.
    """
    chunk = inner * chunk_length(length, inner * degree, order)
    offsets = torch.arange(chunk, dtype=torch.int32, device=device)
    return torch.cat([offsets + c * chunk for c in chunks_of(rank, degree, order)])


def pad(x: Tensor, dim: int, length: int, fill: float | None = 0) -> Tensor:
    """`x` grown at the end of `dim` to `length` elements of value `fill`; None: its last element, repeated."""
    size = x.shape[dim]
    missing = length - size
    if isinstance(missing, int) and missing == 0:
        return x
    if fill is None and not isinstance(missing, int):
        # One op: a padding of symbolic size would guard on whether it is empty, and so on the length modulo the ranks.
        last = torch.arange(length, device=x.device).clamp(max=size - 1)
        return x.index_select(dim, last)
    shape = list(x.shape)
    shape[dim] = missing
    padding = x.narrow(dim, size - 1, 1).detach().expand(shape) if fill is None else x.new_full(shape, fill)
    return torch.cat([x, padding], dim)


def take(x: Tensor, dim: int, rank: int, degree: int, order: str, fill: float | None = 0) -> Tensor:
    """The part of the global `x` that `rank` holds: `local_length` elements along `dim`, padded as by `pad`."""
    chunk = chunk_length(x.shape[dim], degree, order)
    padded = pad(x, dim, chunk * chunks_per_rank(order) * degree, fill)
    parts = [padded.narrow(dim, c * chunk, chunk) for c in chunks_of(rank, degree, order)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)


def restore(ranks: Tensor, dim: int, length: int, order: str) -> Tensor:
    """The global tensor from all ranks' parts on a leading dim: [degree, ..., local, ...] -> [..., length, ...].

    Written with views, flip and cat only, so that it traces to a graph that is the same for every degree.
    """
    return beginning(join(ranks, dim, order), dim, length)


def join(ranks: Tensor, dim: int, order: str) -> Tensor:
    """`restore` that keeps the padding: [degree, ..., local, ...] -> [..., degree * local, ...].

    Of neighbours among more ranks than these, it joins their parts to the part of one member of a layout over so many
    fewer ranks, in the same order.
    """
    degree = ranks.shape[0]
    if chunks_per_rank(order) == 2:
        chunk = ranks.shape[dim + 1] // 2
        ranks = torch.cat([ranks.narrow(dim + 1, 0, chunk), ranks.narrow(dim + 1, chunk, chunk).flip(0)], 0)
        degree = 2 * degree
    joined = ranks.movedim(0, dim)
    shape = [*joined.shape[:dim], degree * joined.shape[dim + 1], *joined.shape[dim + 2 :]]
    return joined.reshape(shape)


def beginning(x: Tensor, dim: int, length: int) -> Tensor:
    """The first `length` elements of `dim`; with a symbolic length a copy.

    Tracing asks whether a view is contiguous. That depends on whether there was padding: the answer would be a guard.
    """
    if isinstance(length, int):
        return x.narrow(dim, 0, length)
    return x.index_select(dim, torch.arange(length, device=x.device))


def split(x: Tensor, dim: int, degree: int, order: str, fill: float | None = 0) -> Tensor:
    """The inverse of `restore`: [..., length, ...] -> [degree, ..., local, ...], rank r's part at index r."""
    chunk = chunk_length(x.shape[dim], degree, order)
    return divide(pad(x, dim, chunk * chunks_per_rank(order) * degree, fill), dim, degree, order, chunk)


def divide(x: Tensor, dim: int, degree: int, order: str, chunk: int) -> Tensor:
    """The inverse of `join`. chunk: elements in one chunk."""
    per_rank = chunks_per_rank(order)
    shape = [*x.shape[:dim], per_rank * degree, chunk, *x.shape[dim + 1 :]]
    chunks = x.reshape(shape).movedim(dim, 0)
    if per_rank == 1:
        return chunks
    return torch.cat([chunks.narrow(0, 0, degree), chunks.narrow(0, degree, degree).flip(0)], dim + 1)


def restore_all(parts: Sequence[Tensor], dim: int, length: int, order: str) -> Tensor:
    """`restore` for a list that holds each rank's part."""
    return restore(torch.stack(list(parts)), dim, length, order)
