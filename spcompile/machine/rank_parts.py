"""Whole tensors, and the parts of them that the ranks of a mesh have: outside of graphs, for inputs and outputs.

`dims` says over which tensor dim each axis splits; an axis that is not in it has the same on all its ranks. Ranks are
row-major over the mesh, parts contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from spcompile.diagnostics import BatchNotSplit
from spcompile.machine import sequence
from spcompile.machine.mesh import MeshShape

Inputs = Mapping[str, Any] | Sequence[Any]


def coordinates(mesh: MeshShape, rank: int) -> dict[str, int]:
    """Where a rank stands on each axis."""
    places = itertools.product(*[range(size) for _, size in mesh.axes])
    return dict(zip([name for name, _ in mesh.axes], next(itertools.islice(places, rank, None)), strict=True))


def part_of(whole: Tensor, dims: Mapping[str, int], mesh: MeshShape, rank: int) -> Tensor:
    """What `rank` has of a tensor; padded at its end where the ranks do not divide it."""
    for axis, dim in dims.items():
        whole = sequence.take(whole, dim, coordinates(mesh, rank)[axis], mesh.size(axis), "contiguous")
    return whole


def whole_of(parts: Sequence[Tensor], dims: Mapping[str, int], shape: Sequence[int], mesh: MeshShape) -> list[Tensor]:
    """The whole tensors of `shape` that all ranks' parts make: one for each place on the axes that do not split."""
    axes = [name for name, _ in mesh.axes]
    values = dict(zip(itertools.product(*[range(size) for _, size in mesh.axes]), parts, strict=True))
    for axis, dim in dims.items():
        at = axes.index(axis)
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for place, value in values.items():
            groups.setdefault((*place[:at], 0, *place[at + 1 :]), []).append(value)
        values = {
            place: sequence.restore_all(group, dim, int(shape[dim]), "contiguous") for place, group in groups.items()
        }
    return list(values.values())


def split_batch(inputs: Inputs, degree: int) -> list[Inputs]:
    """Each dp rank's inputs: its entries of every tensor whose first dim is as long as that of the first tensor.

    Tensors inside of lists, tuples and dicts count too.

    Raises:
        BatchNotSplit: the entries do not divide.
    """
    given = dict(inputs) if isinstance(inputs, Mapping) else list(inputs)
    if degree == 1:
        return [given]
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    entries = next((x.shape[0] for x in tensors if x.ndim), 0)
    if entries == 0 or entries % degree:
        raise BatchNotSplit(f"{entries} batch entries over dp = {degree}", legal=f"a multiple of {degree} entries")

    def part(x: Any, rank: int) -> Any:
        if not isinstance(x, Tensor) or not x.ndim or x.shape[0] != entries:
            return x
        return x.detach().tensor_split(degree)[rank].requires_grad_(x.requires_grad)

    return [pytree.tree_map(partial(part, rank=rank), given) for rank in range(degree)]
