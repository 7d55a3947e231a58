"""Reads this rank's parts of parameters out of checkpoints: torch.distributed.checkpoint folders, safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import IllegalModel
from spcompile.sharding.global_view import Part

INDEX = "model.safetensors.index.json"


def load_parameters(
    model: nn.Module, checkpoint: Path, mesh: DeviceMesh, parts: Mapping[str, tuple[Part, ...]]
) -> None:
    """Fill a model's DTensor parameters and persistent buffers; nothing is read whole that is held in parts.

    parts: how every parameter is split, by name.

    Raises:
        IllegalModel: no checkpoint of a known kind there, or a tensor missing in it or of another shape.
    """
    targets = tensors_of(model)
    if checkpoint.is_dir() and (checkpoint / ".metadata").is_file():
        _load_dcp(targets, checkpoint)
        return
    files = _safetensors_files(checkpoint)
    if not files:
        raise IllegalModel(
            f"checkpoint {str(checkpoint)!r}",
            legal="a folder of torch.distributed.checkpoint, a .safetensors file, or a folder with such files",
        )
    _load_safetensors(targets, files, mesh, parts)


def tensors_of(model: nn.Module) -> dict[str, list[str]] | dict[str, Any]:
    """Every tensor of the state dict, tied ones under one name each: {first name: (all names, tensor)}."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), ([], value))[0].append(name)
    return {names[0]: (names, value) for names, value in found.values()}


def _load_dcp(targets: Mapping[str, Any], folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {}
    for names, value in targets.values():
        wanted[_saved_name(names, set(saved), folder)] = value.detach()
    dcp.load(wanted, checkpoint_id=folder)


def _saved_name(names: list[str], saved: set[str], folder: Path) -> str:
    for name in names:
        for key in (name, f"model.{name}"):  # dcp.save(model.state_dict()), dcp.save({"model": model.state_dict()})
            if key in saved:
                return key
    raise IllegalModel(f"checkpoint {str(folder)!r} has no {names[0]!r}")


def _safetensors_files(checkpoint: Path) -> list[Path]:
    if checkpoint.suffix == ".safetensors" and checkpoint.is_file():
        return [checkpoint]
    if (checkpoint / INDEX).is_file():
        return sorted(
            {checkpoint / name for name in json.loads((checkpoint / INDEX).read_text())["weight_map"].values()}
        )
    return sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else []


def _load_safetensors(
    targets: Mapping[str, Any], files: list[Path], mesh: DeviceMesh, parts: Mapping[str, tuple[Part, ...]]
) -> None:
    from safetensors import safe_open

    missing = {first: names for first, (names, _) in targets.items()}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys = set(tensors.keys())
            for first, names in list(missing.items()):
                key = next((name for name in names if name in keys), None)
                if key is None:
                    continue
                stored, value = tensors.get_slice(key), targets[first][1]
                if tuple(stored.get_shape()) != tuple(value.shape):
                    raise IllegalModel(f"{key} has shape {stored.get_shape()} in {file}", legal=str(tuple(value.shape)))
                _fill(value, stored, mesh, parts.get(first, ()))
                del missing[first]
    if missing:
        raise IllegalModel(f"checkpoint {str(files[0].parent)!r} has no {min(missing)!r}")


def _fill(value: Tensor, stored: Any, mesh: DeviceMesh, parts: tuple[Part, ...]) -> None:
    at = [slice(None)] * value.ndim
    for part in parts:
        size = value.shape[part.dim] // part.degree
        start = mesh.get_local_rank(part.axis) * size
        at[part.dim] = slice(start, start + size)
    with torch.no_grad():
        local = value.to_local() if isinstance(value, DTensor) else value
        local.copy_(stored[tuple(at)] if value.ndim else stored[...])
