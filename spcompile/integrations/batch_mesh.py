"""A mesh as training tools see it: the ranks of one `tp` x `cp` group work at one batch, and `dp` says at which one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import IllegalMesh, IllegalOption
from spcompile.machine.mesh import runtime_mesh
from spcompile.options import Options


def is_sharded(model: nn.Module) -> bool:
    """Whether `parallelize` has split its parameters, and compiled it."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@dataclass(frozen=True)
class BatchMesh:
    """A mesh of all processes.

    device_mesh: its axes are out of `dp`, `tp`, `cp`; None for one process.
    """

    device_mesh: DeviceMesh | None

    @classmethod
    def over(cls, mesh: DeviceMesh | Mapping[str, int] | None, device_type: str, processes: int) -> BatchMesh:
        """Of sizes of axes, the first one outermost, or of a DeviceMesh; default: `cp` over all processes.

        Raises:
            IllegalMesh: it is not one of all processes, or has neither `tp` nor `cp`.
        """
        if isinstance(mesh, Mapping) and not {"tp", "cp"} & mesh.keys():
            mesh = {**mesh, "cp": 1}
        found = runtime_mesh(mesh, device_type)
        made = cls(found.device_mesh if found is not None else None)
        if made.device_mesh is not None and not made.own_axes:
            raise IllegalMesh(f"{found.shape if found else ''}", legal="a mesh with an axis tp or cp")
        if made.device_mesh is not None and made.device_mesh.size() != processes:
            raise IllegalMesh(f"{made.device_mesh} for {processes} processes", legal="a mesh of all processes")
        return made

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of all axes."""
        return (self.device_mesh.mesh_dim_names if self.device_mesh is not None else None) or ()

    @property
    def own_axes(self) -> tuple[str, ...]:
        """The axes that the model is compiled over."""
        return tuple(name for name in self.axes if name != "dp")

    @property
    def count(self) -> int:
        """How many different batches one step has: the size of `dp`."""
        return self.device_mesh.size(self.axes.index("dp")) if self.device_mesh is not None and "dp" in self.axes else 1

    @property
    def index(self) -> int:
        """Which of the batches of a step this process has: its place along `dp`."""
        return self.device_mesh.get_local_rank("dp") if self.device_mesh is not None and "dp" in self.axes else 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Processes that have all the batches of a step, each once; None where a step has one batch."""
        return self.device_mesh.get_group("dp") if self.device_mesh is not None and self.count > 1 else None

    def backend_options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Options of the backend, with the mesh of one batch.

        Raises:
            IllegalOption: one that does not exist, or `mesh`.
        """
        asked = {**(given or {})}
        if "mesh" in asked:
            raise IllegalOption("spcompile_options={'mesh': ...}", legal="mesh=")
        if self.device_mesh is not None:
            asked["mesh"] = self.device_mesh[self.own_axes] if "dp" in self.axes else self.device_mesh
        Options.parse(asked)
        return asked

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all batches of a step, behind each other in dim 0, of which each may have another size."""
        tensor = tensor[None] if tensor.ndim == 0 else tensor.contiguous()
        if self.group is None:
            return tensor
        sizes = [torch.empty(1, dtype=torch.long, device=tensor.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.full_like(sizes[0], tensor.shape[0]), group=self.group)
        counts = [int(size) for size in sizes]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def share_random_states(self, device: torch.device) -> None:
        """The first rank's, along `tp`, then along `cp`: what ranks draw for one batch is the same."""
        if self.device_mesh is None:
            return
        states = random_states(device)
        for axis in ("tp", "cp"):
            if axis in self.axes:
                group = self.device_mesh.get_group(axis)
                dist.broadcast_object_list(states, src=dist.get_global_rank(group, 0), group=group, device=device)
        set_random_states(states, device)


def random_states(device: torch.device) -> list[Any]:
    """Of all generators that data loaders and models draw from."""
    on_device = torch.get_device_module(device).get_rng_state(device) if device.type != "cpu" else None
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device]


def set_random_states(states: list[Any], device: torch.device) -> None:
    """What `random_states` has returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.get_device_module(device).set_rng_state(states[3], device)
