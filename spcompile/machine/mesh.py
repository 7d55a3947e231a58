"""Named mesh axes. Compilation needs only names and sizes; ranks and process groups appear when a graph runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from spcompile.diagnostics import IllegalMesh, NoProcessGroup

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("dp", "tp", "cp")
MOST_RANKS = 1 << 17
LEGAL_MESH = 'a DeviceMesh with axis names, or a dict of axis sizes as {"cp": 8}'


class AxisPart(NamedTuple):
    """A factor of an axis: `size` neighbours along it (inner), or every so manyth of its ranks (outer).

    An axis of P = inner * outer ranks is a mesh of both, its rank r being (r // inner, r % inner). The name of a part,
    as `cp.inner2` or `cp.outer4`, stands wherever that of an axis does.
    """

    axis: str
    is_inner: bool
    size: int

    def groups(self, ranks: Sequence[int]) -> list[list[int]]:
        """The groups of this part among the ranks of one group of the axis, in its order."""
        count = len(ranks) // self.size
        if self.is_inner:
            return [list(ranks[i * self.size : (i + 1) * self.size]) for i in range(count)]
        return [list(ranks[i::count]) for i in range(count)]


def inner_part(axis: str, size: int) -> str:
    """The name of groups of `size` neighbours along an axis."""
    return f"{axis}.inner{size}"


def outer_part(axis: str, size: int) -> str:
    """The name of groups of `size` ranks that are equally far apart along an axis, as far as they can be."""
    return f"{axis}.outer{size}"


def axis_part(name: str) -> AxisPart | None:
    """The part of an axis that has this name; None for a whole axis."""
    found = re.fullmatch(r"(\w+)\.(inner|outer)(\d+)", name)
    return AxisPart(found[1], found[2] == "inner", int(found[3])) if found else None


Channel = Literal["messages", "gradients"]


def on_channel(axis: str, channel: Channel | None) -> str:
    """The name of the group along an axis, or a part of one, that a channel has for itself."""
    return axis if channel is None else f"{axis}/{channel}"


def is_whole_axis(name: str) -> bool:
    """Whether the group of this name is that of an axis, which the mesh brings along; others are made."""
    return axis_part(name) is None and "/" not in name


def whole_axis(name: str) -> str:
    """The axis that a name, of an axis or of a part of one, speaks of."""
    part = axis_part(name)
    return name if part is None else part.axis


@dataclass(frozen=True)
class MeshShape:
    """Axis names and sizes, outermost first. Equal on all ranks; all that a pass may know about the machine."""

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> MeshShape:
        """From `{"tp": 2, "cp": 4}`.

        Raises:
            IllegalMesh: an axis has an unknown name or no positive size, or there are more ranks than anyone has.
        """
        for name, size in sizes.items():
            if name not in AXES:
                raise IllegalMesh(f"axis {name!r}", legal=f"axis names {', '.join(AXES)}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise IllegalMesh(f"axis {name!r} of size {size!r}", legal="a positive int")
        shape = cls(tuple(sizes.items()))
        if shape.world_size > MOST_RANKS:
            raise IllegalMesh(f"{shape}: {shape.world_size} ranks", legal=f"at most {MOST_RANKS} ranks")
        return shape

    def size(self, axis: str) -> int:
        """Number of ranks along `axis` or a part of one; 1 if the mesh has no such axis."""
        part = axis_part(axis)
        return dict(self.axes).get(axis, 1) if part is None else part.size

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
        """The c10d name of this rank's group along `axis`: what a collective in an emitted graph is bound to.

        Groups of parts of axes, and those of channels on either, are made when they are first asked for: all their
        ranks must ask in the same order.
        """
        if is_whole_axis(axis):
            return str(self.device_mesh.get_group(axis).group_name)
        import torch.distributed as dist

        name, _, channel = axis.partition("/")
        part = axis_part(name)
        ranks = dist.get_process_group_ranks(self.device_mesh.get_group(whole_axis(name)))
        own = ranks if part is None else next(group for group in part.groups(ranks) if dist.get_rank() in group)
        assert dist.group.WORLD is not None
        made = _group_of(dist.group.WORLD, tuple(own), channel, self.device_mesh.device_type)
        return str(made.group_name)

    @property
    def coordinate(self) -> str:
        """This rank's place along each axis: `0.3`."""
        return ".".join(map(str, self.device_mesh.get_coordinate() or ()))

    @property
    def key(self) -> str:
        """Equal on all ranks of the mesh, different for meshes over other ranks."""
        text = f"{self.shape}|{self.device_mesh.mesh.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def unbound(world: dist.ProcessGroup) -> Iterator[None]:
    """Groups that are made inside do not know that `init_process_group` bound the world to a device.

    torch 2.11 to 2.13 read it in `_new_process_group_helper`; the communicator of the world stays as it is.
    """
    device = world.bound_device_id
    try:
        if device is not None:
            world.bound_device_id = None
        yield
    finally:
        if device is not None:
            world.bound_device_id = device


@functools.cache
def _group_of(world: dist.ProcessGroup, ranks: tuple[int, ...], channel: str, device_type: str) -> dist.ProcessGroup:
    """The group of some ranks for a channel, made once for each world by its members alone.

    Where the world is bound to a device, torch would split its communicator, for which all ranks of the world must
    come, also those of no mesh (pytorch/pytorch#129965). So the group is made as if it were not: its communicator
    connects its members alone, when they first send. It waits as long as the world does. AOTAutograd compiles under a
    fake mode, and groups are made for real, as `Agreement` communicates.
    """
    from spcompile.torch_private import no_python_dispatcher, unset_fake_temporarily
    from spcompile.torch_private_groups import group_timeout, local_group

    name = "_".join(["spcompile", device_type, channel, *map(str, ranks)])
    with unset_fake_temporarily(), no_python_dispatcher(), unbound(world):
        return local_group(name, ranks, group_timeout(device_type))


def runtime_mesh(mesh: DeviceMesh | Mapping[str, int] | None, device_type: str) -> RuntimeMesh | None:
    """The mesh to compile for; None on one device.

    Without `mesh`: one `cp` axis over the whole world.

    Raises:
        NoProcessGroup: the launcher set WORLD_SIZE > 1 but no process group exists.
        IllegalMesh: unnamed axes, names that mean nothing here, or sizes that do not make up the world.
    """
    if mesh is None or isinstance(mesh, Mapping):
        shape = _shape_over_world(mesh)
        return RuntimeMesh(shape, _mesh_over_world(shape, device_type)) if shape.world_size > 1 else None
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise IllegalMesh(f"mesh={mesh!r}", legal=LEGAL_MESH)
    if mesh.mesh_dim_names is None:
        raise IllegalMesh("a DeviceMesh without axis names", legal=f"mesh_dim_names out of {', '.join(AXES)}")
    shape = MeshShape.of(dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True)))
    return RuntimeMesh(shape, mesh) if shape.world_size > 1 else None


def mesh_of_sizes(sizes: Mapping[str, int], device_type: str) -> DeviceMesh:
    """All ranks as a mesh with axes of these sizes, the first one outermost; one rank is a mesh, too.

    Raises:
        NoProcessGroup, IllegalMesh: as `runtime_mesh` does; the former also for one process without a group.
    """
    import torch.distributed as dist

    shape = _shape_over_world(sizes)
    if not dist.is_initialized():
        raise NoProcessGroup("a mesh of one process", legal="call torch.distributed.init_process_group() before")
    return _mesh_over_world(shape, device_type)


def _shape_over_world(sizes: Mapping[str, int] | None) -> MeshShape:
    import torch.distributed as dist  # slow to import: options and explain need meshes without it

    initialized = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if initialized else _launched_world_size()
    shape = MeshShape.of({"cp": world} if sizes is None else sizes)
    if not shape.axes or shape.world_size != world:
        counted = f"{shape.world_size} rank{'s' if shape.world_size > 1 else ''}"
        raise IllegalMesh(
            f"{str(shape) or 'no axes'}: {counted} of {world} launched",
            legal=f"sizes whose product is {world}, or torchrun --nproc-per-node {shape.world_size}",
        )
    return shape


def _mesh_over_world(shape: MeshShape, device_type: str) -> DeviceMesh:
    """The same sizes give the same mesh: its process groups are made when they are first asked for, by all ranks."""
    import torch.distributed as dist

    return _mesh_of_world(dist.group.WORLD, shape, device_type)


@functools.cache
def _mesh_of_world(world: dist.ProcessGroup | None, shape: MeshShape, device_type: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    from spcompile.torch_private import no_python_dispatcher, unset_fake_temporarily

    names, sizes = zip(*shape.axes, strict=True)
    with unset_fake_temporarily(), no_python_dispatcher():  # compiling, as `_group_of` does
        return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def _launched_world_size() -> int:
    import os

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise NoProcessGroup(
            f"WORLD_SIZE is {world} but torch.distributed is not initialised",
            legal="call torch.distributed.init_process_group() before the model is compiled",
        )
    return world
