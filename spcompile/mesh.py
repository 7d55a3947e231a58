"""Named mesh axes. Compilation needs only names and sizes; ranks and process groups appear when a graph runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spcompile.diagnostics import IllegalMesh, NoProcessGroup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp", "tp", "cp")


@dataclass(frozen=True)
class MeshShape:
    """Axis names and sizes, outermost first. Equal on all ranks; all that a pass may know about the machine."""

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> MeshShape:
        """From `{"tp": 2, "cp": 4}`.

        Raises:
            IllegalMesh: an axis has an unknown name or no positive size.
        """
        for name, size in sizes.items():
            if name not in AXES:
                raise IllegalMesh(f"axis {name!r}", legal=f"axis names {', '.join(AXES)}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise IllegalMesh(f"axis {name!r} of size {size!r}", legal="a positive int")
        return cls(tuple(sizes.items()))

    def size(self, axis: str) -> int:
        """Number of ranks along `axis`; 1 if the mesh has no such axis."""
        return dict(self.axes).get(axis, 1)

    @property
    def world_size(self) -> int:
        """Number of ranks of the whole mesh."""
        world = 1
        for _, size in self.axes:
            world *= size
        return world

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.axes)


@dataclass(frozen=True)
class RuntimeMesh:
    """A mesh whose process groups exist in this process."""

    shape: MeshShape
    device_mesh: DeviceMesh

    def group_name(self, axis: str) -> str:
        """The c10d name of this rank's group along `axis`: what a collective in an emitted graph is bound to."""
        return str(self.device_mesh.get_group(axis).group_name)

    @property
    def key(self) -> str:
        """Equal on all ranks of the mesh, different for meshes over other ranks."""
        text = f"{self.shape}|{self.device_mesh.mesh.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def runtime_mesh(mesh: DeviceMesh | None, device_type: str) -> RuntimeMesh | None:
    """The mesh to compile for; None on one device.

    Without `mesh`: one `cp` axis over the whole world.

    Raises:
        NoProcessGroup: the launcher set WORLD_SIZE > 1 but no process group exists.
        IllegalMesh: unnamed axes, or names that mean nothing here.
    """
    import torch.distributed as dist  # slow to import: options and explain need meshes without it
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if mesh is None:
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else _launched_world_size()
        if world == 1:
            return None
        mesh = init_device_mesh(device_type, (world,), mesh_dim_names=("cp",))
    if not isinstance(mesh, DeviceMesh):
        raise IllegalMesh(f"mesh={mesh!r}", legal="a DeviceMesh with named axes")
    if mesh.mesh_dim_names is None:
        raise IllegalMesh("a DeviceMesh without axis names", legal=f"mesh_dim_names out of {', '.join(AXES)}")
    shape = MeshShape.of(dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True)))
    return RuntimeMesh(shape, mesh) if shape.world_size > 1 else None


def _launched_world_size() -> int:
    import os

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise NoProcessGroup(
            f"WORLD_SIZE is {world} but torch.distributed is not initialised",
            legal="call torch.distributed.init_process_group() before the model is compiled",
        )
    return world
