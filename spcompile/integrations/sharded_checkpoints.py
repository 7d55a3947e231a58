"""Checkpoints of a Trainer whose model `parallelize` has sharded: whole, as one process writes and reads them.

So a run goes on over another mesh, or in one process. The first rank alone ever has a whole tensor for longer than one
parameter takes, on the host; a rank that reads keeps its own parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from spcompile.parameters.checkpoints import checkpoint_for, load_parameters
from spcompile.parameters.sharded_modules import local_part, parts_of_dtensor


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors on the host, on the first rank; {} on the others, which help.

    Called by all ranks.
    """
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first = all(not any(p.device_mesh.get_coordinate() or ()) for p in parameters if isinstance(p, DTensor))

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):
            value = value.full_tensor()
            return value.cpu() if first else None
        return value

    values = {at: {name: whole(value) for name, value in kept.items()} for at, kept in state["state"].items()}
    return {**state, "state": values} if first else {}


def own_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Of a whole state dict what this rank keeps: where a parameter is split, its parts of what has the same shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def own(parameter: Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        mesh = parameter.device_mesh
        local = local_part(value, parts_of_dtensor(parameter), mesh).to(parameter.device, copy=True).contiguous()
        return DTensor.from_local(local, mesh, parameter.placements, run_check=False)

    values = {at: {n: own(parameters[at], value) for n, value in kept.items()} for at, kept in state["state"].items()}
    return {**state, "state": values}


def read_weights(model: nn.Module, folder: str) -> None:
    """Fill a sharded model from a checkpoint with whole weights. Called by all ranks.

    Raises:
        IllegalModel: the folder has no safetensors, or others than the model's; the same error on all ranks.
    """
    parts = {name: parts_of_dtensor(p) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    mesh = _mesh_of(model)
    with torch.no_grad():
        load_parameters(model, checkpoint_for(model, Path(folder), mesh), mesh, parts)


def _mesh_of(model: nn.Module) -> DeviceMesh:
    return next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
