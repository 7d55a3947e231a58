"""Modules whose parameters are DTensors, under the names they had.

The DTensor stays in `module._parameters[name]`, where optimizers, checkpoints and `named_parameters` find it. The
module's class is replaced by a subclass in which the name is a property: traced, it is the global view of the part
that this rank holds; read from outside, it is the DTensor; in the module's own uncompiled forward, the whole tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from spcompile.sharding.global_view import Part, global_view, nested

Parts = tuple[Part, ...]

_WHOLE = "_spx_whole"  # set on a module while its own forward runs uncompiled


def placements_of(parts: Parts, mesh: DeviceMesh) -> list[Placement]:
    """The DTensor placements, one per axis of the mesh."""
    dims = {part.axis: part.dim for part in parts}
    return [Shard(dims[axis]) if axis in dims else Replicate() for axis in mesh.mesh_dim_names or ()]


def parts_of_dtensor(parameter: DTensor) -> Parts:
    """How a parameter is split: what `placements_of` was given."""
    mesh = parameter.device_mesh
    placed = zip(mesh.mesh_dim_names or (), parameter.placements, strict=True)
    return nested(
        Part(placement.dim, axis, mesh[axis].size()) for axis, placement in placed if isinstance(placement, Shard)
    )


def local_shape(shape: torch.Size, parts: Parts) -> torch.Size:
    """The shape of one rank's part."""
    sizes = list(shape)
    for part in parts:
        sizes[part.dim] //= part.degree
    return torch.Size(sizes)


def local_part(whole: Tensor, parts: Parts, mesh: DeviceMesh) -> Tensor:
    """This rank's part of a whole tensor: a view of it."""
    for part in parts:
        size = whole.shape[part.dim] // part.degree
        whole = whole.narrow(part.dim, mesh.get_local_rank(part.axis) * size, size)
    return whole


def as_parameter(local: Tensor, like: nn.Parameter, parts: Parts, mesh: DeviceMesh) -> nn.Parameter:
    """The DTensor parameter that stands for `like`, of which `local` is this rank's part."""
    placements = placements_of(parts, mesh)
    stride = torch.empty(like.shape, device="meta").stride()
    data = DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=stride)
    new = nn.Parameter(data, requires_grad=like.requires_grad)
    new.__dict__.update(like.__dict__)
    return new


def install(module: nn.Module, new: Mapping[str, nn.Parameter], parts: Mapping[str, Parts]) -> None:
    """Give a module its own DTensor parameters, and the class that reads them."""
    for name, parameter in new.items():
        module._parameters[name] = parameter
    if new:
        base: Any = type(module)
        module.__class__ = _subclass(base, tuple((name, parts[name]) for name in new))


@functools.cache
def _subclass(base: Any, parts: tuple[tuple[str, Parts], ...]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        outer = self.__dict__.get(_WHOLE, False)
        self.__dict__[_WHOLE] = True
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self.__dict__[_WHOLE] = outer

    properties = {name: _property(name, of_name) for name, of_name in parts}
    kept = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**properties, **kept, "forward": forward})


def _property(name: str, parts: Parts) -> property:
    def read(self: Any) -> Any:
        parameter = self._parameters[name]
        if torch.compiler.is_compiling():
            return global_view(parameter.to_local(), parts)
        return parameter.full_tensor() if self.__dict__.get(_WHOLE) else parameter

    return property(read)
