"""`spcompile.broadcast`: rank 0's parameters and buffers become those of all. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


def broadcast(model: nn.Module, mesh: DeviceMesh | Mapping[str, int] | None = None) -> nn.Module:
    """Give all ranks of a mesh the parameters and buffers of its first rank, in place. Called by all of them.

    A parameter that is split over an axis keeps its parts: along that axis nothing is sent.

    mesh: as the option `mesh`; default: all ranks.

    Returns the model.

    Raises:
        NoProcessGroup, IllegalMesh: as the backend does.
    """
    import torch
    import torch.distributed as dist

    from spcompile.machine.mesh import runtime_mesh
    from spcompile.program.checksum import part_on_this_rank
    from spcompile.program.same_inputs import split_axes

    state = [*model.parameters(), *model.buffers()]
    device = next((x.device.type for x in state), "cpu")
    found = runtime_mesh(mesh, device)
    if found is None:
        return model
    with torch.no_grad():
        for tensor in state:
            for axis, size in found.shape.axes:
                if size > 1 and axis not in split_axes(tensor):
                    group = found.device_mesh.get_group(axis)
                    part = part_on_this_rank(tensor)
                    whole = part.contiguous()
                    dist.broadcast(whole, src=dist.get_global_rank(group, 0), group=group)
                    if whole is not part:
                        part.copy_(whole)
    return model
