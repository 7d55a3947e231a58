"""Fills a model's DTensors with this rank's parts out of a checkpoint: of torch.distributed.checkpoint, or safetensors.

A checkpoint is looked at as a whole before anything of a model is changed: its files, and the shape and dtype of every
tensor. What is wrong on one rank is raised on all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import IllegalModel
from spcompile.machine.shared_failure import failing_together
from spcompile.parameters.dcp_folder import DcpFolder
from spcompile.parameters.safetensors_files import SafetensorsFiles, files_of
from spcompile.parameters.stored import Targets
from spcompile.plain_text import one_line
from spcompile.sharding.global_view import Part

log = logging.getLogger(__name__)
_SHOWN = 3  # names of tensors that nobody asked for


class Checkpoint(Protocol):
    """What a kind of checkpoint offers."""

    def require(self, targets: Targets) -> set[str]:
        """Look at the place of every target; returns the names of all other tensors.

        Raises:
            IllegalModel: one is missing, of another shape or dtype, or its file is damaged.
        """
        ...

    def fill(self, targets: Targets, mesh: DeviceMesh, parts: Mapping[str, tuple[Part, ...]]) -> None:
        """Read this rank's parts. parts: how every parameter is split, by name."""
        ...

    def place_of(self, names: list[str]) -> str:
        """The file or folder that has a target."""
        ...


def checkpoint_for(model: nn.Module, place: Path, mesh: DeviceMesh) -> Checkpoint:
    """The checkpoint at a place, if all of the model can be read from it.

    Raises:
        IllegalModel: it cannot; the same error on all ranks of the mesh.
    """
    with failing_together(mesh, IllegalModel):
        found: Checkpoint
        if place.is_dir() and (place / ".metadata").is_file():
            found = DcpFolder(place)
        else:
            files = files_of(place)
            if not files:
                reason = "nothing in it is known" if place.exists() else "there is none"
                raise IllegalModel(
                    f"checkpoint {str(place)!r}: {reason}",
                    legal="a folder of torch.distributed.checkpoint, a .safetensors file, or a folder with such files",
                )
            found = SafetensorsFiles(place, files)
        others = sorted(found.require(tensors_of(model)))
    if others and dist.get_rank() == 0:
        shown = ", ".join(map(repr, others[:_SHOWN])) + (", ..." if len(others) > _SHOWN else "")
        log.warning("%s: %d tensors that the model does not have: %s", one_line(str(place)), len(others), shown)
    return found


def load_parameters(
    model: nn.Module, checkpoint: Checkpoint, mesh: DeviceMesh, parts: Mapping[str, tuple[Part, ...]]
) -> None:
    """Fill a model's DTensor parameters and persistent buffers; nothing is read whole that is held in parts.

    parts: how every parameter is split, by name.

    Raises:
        IllegalModel: a file cannot be read, or a value is not a number; the same error on all ranks of the mesh.
    """
    targets = tensors_of(model)
    with failing_together(mesh, IllegalModel):
        checkpoint.fill(targets, mesh, parts)
        for names, value in targets.values():
            _require_numbers(names, value, checkpoint)


def tensors_of(model: nn.Module) -> Targets:
    """Every tensor of the state dict, tied ones under one name each: {first name: (all names, tensor)}."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), ([], value))[0].append(name)
    return {names[0]: (names, value) for names, value in found.values()}


def _require_numbers(names: list[str], value: Tensor, checkpoint: Checkpoint) -> None:
    """Buffers may be infinite, as masks are."""
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    if not (local.is_floating_point() or local.is_complex()) or local.numel() == 0:
        return
    if local.dtype.itemsize == 1:  # float8 has no test for NaN
        local = local.to(torch.float32)
    if bool(local.isnan().any()):
        raise IllegalModel(f"{names[0]!r} has values that are NaN in {checkpoint.place_of(names)!r}")
    if isinstance(value, nn.Parameter) and bool(local.isinf().any()):
        dtype = str(value.dtype).removeprefix("torch.")
        raise IllegalModel(f"{names[0]!r} has values that are infinite as {dtype}, in {checkpoint.place_of(names)!r}")
