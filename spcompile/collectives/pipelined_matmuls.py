"""Products that hide a collective: each rank's part is multiplied while the next one travels.

    all_gather_matmul      the parts of x go around; each is multiplied by all weights while the next one arrives
    matmul_reduce_scatter  the sums for each rank go around; a product is added to one while another one arrives

One op with the loop inside, written once as a generator of requests like ring attention: only at run time a rank knows
which rows a hop is about, products are written where they belong without a copy, and graphs do not grow with the ranks.
Sums are taken in a fixed order, and a product is added to what arrived before it is rounded: with the same dtype on the
wire there is one rounding a hop, where a product and then a reduce-scatter have two.

Where the last argument, `symmetric`, is true, torch's operators on symmetric memory do the same instead: GPUs of one
node read each other's memory, and no multiprocessor is busy sending (torch/distributed/_symmetric_memory, 2.13).

Of an operand [*lead, rows, *inner, width], split along `rows`: B is the size of all of lead, M that of all of inner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spcompile.collectives.collective import with_size
from spcompile.collectives.point_to_point import Requests, Shift, Wait, drive, drive_all
from spcompile.diagnostics import RanksDisagree
from spcompile.torch_private import fused_all_gather_matmul, fused_matmul_reduce_scatter
from spcompile.torch_private_groups import resolve_process_group

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_LIBRARY.define(
    "all_gather_matmul(Tensor x, Tensor[] weights, int dim, SymInt length, str axis, int degree, bool gathered, "
    "bool symmetric=False) -> Tensor[]",
    tags=_TAGS,
)
_LIBRARY.define(
    "matmul_reduce_scatter(Tensor[] xs, Tensor[] weights, SymInt[] shape, int dim, str axis, int degree, "
    "bool symmetric=False) -> Tensor",
    tags=_TAGS,
)


@dataclass(frozen=True)
class Cut:
    """How a dim of `length` elements, each of `inner` rows, is cut into a chunk for each rank, in natural order."""

    length: int
    inner: int
    degree: int

    @property
    def rows(self) -> int:
        """Rows of a chunk, padding included."""
        return -(-self.length // self.degree) * self.inner

    def first(self, chunk: int) -> int:
        """The first row of a chunk among all."""
        return chunk * self.rows

    def present(self, chunk: int) -> int:
        """Rows of a chunk that are not padding."""
        return min(self.rows, max(0, self.length * self.inner - self.first(chunk)))


def gather_and_multiply(
    rank: int,
    x: Tensor,
    weights: Sequence[Tensor],
    dim: int,
    length: int,
    axis: str,
    degree: int,
    gathered: bool,
) -> Requests[list[Tensor]]:
    """One rank of spx::all_gather_matmul. At hop h it has the part of the rank h before it."""
    B, cut = math.prod(x.shape[:dim]), Cut(length, math.prod(x.shape[dim + 1 : -1]), degree)
    chunk = x.reshape(B, cut.rows, x.shape[-1]).contiguous()
    outs = [x.new_empty(B, length * cut.inner, weight.shape[1]) for weight in weights]
    whole = x.new_empty(B, degree * cut.rows, x.shape[-1]) if gathered else None
    for hop in range(degree):
        at = (rank - hop) % degree
        handle = None
        if hop + 1 < degree:
            # Parts arrive where they belong, if their rows there lie together in memory.
            before = (at - 1) % degree
            place = whole.narrow(1, cut.first(before), cut.rows) if whole is not None and B == 1 else None
            handle = yield Shift(chunk, into=place)
        rows = slice(cut.first(at), cut.first(at) + cut.present(at))
        for out, weight in zip(outs, weights, strict=True):
            for row in range(B):
                torch.mm(chunk[row, : cut.present(at)], weight, out=out[row, rows])
        if whole is not None and (hop == 0 or B > 1):
            whole.narrow(1, cut.first(at), cut.rows).copy_(chunk)
        if handle is not None:
            chunk = yield Wait(handle)
    results = [out.flatten(0, 1) for out in outs]
    if whole is None:
        return results
    whole = whole.narrow(1, 0, length * cut.inner)
    shape = with_size(x.shape, dim, length)
    if B == 1 and degree * cut.rows == length * cut.inner:
        return [whole.view(shape), *results]
    return [whole.reshape(shape).clone(memory_format=torch.contiguous_format), *results]


def multiply_and_scatter(
    rank: int, xs: Sequence[Tensor], weights: Sequence[Tensor], shape: Sequence[int], dim: int, axis: str, degree: int
) -> Requests[Tensor]:
    """One rank of spx::matmul_reduce_scatter.

    The sum for a rank starts behind that rank and ends there. It travels in two halves: one arrives while products are
    added to the other.
    """
    B, cut = math.prod(shape[:dim]), Cut(shape[dim], math.prod(shape[dim + 1 : -1]), degree)
    operands = [x.unflatten(0, (B, cut.length * cut.inner)) for x in xs]
    result = xs[0].new_empty(B, cut.rows, shape[-1])
    halves = [half for half in (slice(0, cut.rows // 2), slice(cut.rows // 2, cut.rows)) if half.stop > half.start]
    handles: list[Any] = [None] * len(halves)
    for hop in range(degree):
        at = (rank - 1 - hop) % degree
        for number, half in enumerate(halves):
            place = result[:, half]
            if hop == 0:
                total = result.new_empty(place.shape)
            else:
                total = yield Wait(handles[number])
            present = max(0, min(cut.present(at), half.stop) - half.start)
            start = cut.first(at) + half.start
            for row in range(B):
                rows = [x[row, start : start + present] for x in operands]
                _add_products(total[row, :present], rows, weights, is_first=hop == 0)
                if hop == 0:
                    total[row, present:] = 0
            if hop + 1 < degree:
                handles[number] = yield Shift(total, into=place if hop + 2 == degree and B == 1 else None)
            elif total.data_ptr() != place.data_ptr():
                place.copy_(total)
    return result.view(with_size(shape, dim, cut.rows // cut.inner))


def _add_products(total: Tensor, rows: Sequence[Tensor], weights: Sequence[Tensor], is_first: bool) -> None:
    """Add products to a sum, in place; before the first one it holds nothing that is read."""
    for x, weight in zip(rows, weights, strict=True):
        if is_first:
            torch.mm(x, weight, out=total)
        else:
            total.addmm_(x, weight)
        is_first = False


def _group(axis: str, degree: int) -> dist.ProcessGroup:
    group = resolve_process_group(axis)
    if group.size() != degree:
        raise RanksDisagree(f"group {axis!r} has {group.size()} ranks, the graph was compiled for {degree}")
    return group


@torch.no_grad()
def _all_gather_matmul(
    x: Tensor,
    weights: Sequence[Tensor],
    dim: int,
    length: int,
    axis: str,
    degree: int,
    gathered: bool,
    symmetric: bool = False,
) -> list[Tensor]:
    group = _group(axis, degree)
    if symmetric:
        whole, outs = fused_all_gather_matmul(x, list(weights), dim, group.group_name, return_A=gathered)
        results = [out.flatten(0, -2) for out in outs]
        return [whole.contiguous(), *results] if gathered else results
    return drive(gather_and_multiply(group.rank(), x, weights, dim, length, axis, degree, gathered), group)


@torch.no_grad()
def _matmul_reduce_scatter(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    shape: Sequence[int],
    dim: int,
    axis: str,
    degree: int,
    symmetric: bool = False,
) -> Tensor:
    group = _group(axis, degree)
    if symmetric:
        x, weight = *xs, *weights
        rows = x.reshape(*shape[:-1], x.shape[-1])
        return fused_matmul_reduce_scatter(rows, weight, "sum", dim, group.group_name).contiguous()
    return drive(multiply_and_scatter(group.rank(), xs, weights, shape, dim, axis, degree), group)


def spec_all_gather_matmul(ranks: Sequence[tuple[Any, ...]]) -> list[list[Tensor]]:
    """What spx::all_gather_matmul returns on every rank, given every rank's arguments; needs no process group."""
    return drive_all([gather_and_multiply(rank, *args[:7]) for rank, args in enumerate(ranks)])


def spec_matmul_reduce_scatter(ranks: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """What spx::matmul_reduce_scatter returns on every rank, given every rank's arguments."""
    return drive_all([multiply_and_scatter(rank, *args[:6]) for rank, args in enumerate(ranks)])


def _fake_all_gather_matmul(
    x: Tensor, weights: Sequence[Tensor], dim: int, length: int, axis: str, degree: int, gathered: bool, *_: Any
) -> list[Tensor]:
    shape = with_size(x.shape, dim, length)
    rows = math.prod(shape[:-1])
    products = [x.new_empty(rows, weight.shape[1]) for weight in weights]
    return [x.new_empty(shape), *products] if gathered else products


def _fake_matmul_reduce_scatter(
    xs: Sequence[Tensor], weights: Sequence[Tensor], shape: Sequence[int], dim: int, axis: str, degree: int, *_: Any
) -> Tensor:
    return xs[0].new_empty(with_size(shape, dim, -(-shape[dim] // degree)))


for _name, _kernel, _fake in (
    ("all_gather_matmul", _all_gather_matmul, _fake_all_gather_matmul),
    ("matmul_reduce_scatter", _matmul_reduce_scatter, _fake_matmul_reduce_scatter),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spx::{_name}", _fake, lib=_LIBRARY)

all_gather_matmul = torch.ops.spx.all_gather_matmul.default
matmul_reduce_scatter = torch.ops.spx.matmul_reduce_scatter.default
PIPELINED = (all_gather_matmul, matmul_reduce_scatter)
