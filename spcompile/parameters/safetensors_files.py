"""Checkpoints of safetensors: one file, a folder of files, or files that an index names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from spcompile.diagnostics import IllegalModel
from spcompile.parameters.stored import Targets, inside, require_like, require_plain_file
from spcompile.sharding.global_view import Part

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def files_of(place: Path) -> list[Path]:
    """The files of a checkpoint, in order; none where it is no checkpoint of this kind.

    Raises:
        IllegalModel: the index is broken, or points out of its folder.
    """
    if place.suffix == ".safetensors" and not place.is_dir():
        return [place]
    if (place / INDEX).is_file():
        return sorted({inside(place, name, place / INDEX) for name in _weight_map(place / INDEX).values()})
    return sorted(place.glob("*.safetensors")) if place.is_dir() else []


class SafetensorsFiles:
    """Open files are not kept: each is opened when it is looked at, and when it is read."""

    def __init__(self, place: Path, files: list[Path]) -> None:
        self._place, self._files = place, files
        self._file_of: dict[str, Path] = {}

    def require(self, targets: Targets) -> set[str]:
        """See Checkpoint."""
        key_of = {name: first for first, (names, _) in targets.items() for name in names}
        missing = set(targets)
        for file in self._files:
            with _opened(file, self._place) as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    if key in self._file_of:
                        both = f"{str(self._file_of[key])!r} and {str(file)!r}"
                        raise IllegalModel(f"{key!r} is in {both}", legal="each tensor in one file")
                    self._file_of[key] = file
                    if key in key_of:
                        stored = tensors.get_slice(key)
                        dtype = _DTYPES.get(stored.get_dtype(), stored.get_dtype())
                        require_like(key, stored.get_shape(), dtype, targets[key_of[key]][1], file)
                        missing.discard(key_of[key])
        self._require_index()
        if missing:
            raise IllegalModel(f"checkpoint {str(self._place)!r} has no {min(missing)!r}")
        return set(self._file_of) - set(key_of)

    def fill(self, targets: Targets, mesh: DeviceMesh, parts: Mapping[str, tuple[Part, ...]]) -> None:
        """See Checkpoint."""
        key_in: dict[Path, list[tuple[str, str]]] = {}
        for first, (names, _) in targets.items():
            key = self._key(names)
            key_in.setdefault(self._file_of[key], []).append((first, key))
        for file, keys in key_in.items():
            with _opened(file, self._place) as tensors:
                for first, key in keys:
                    _fill(targets[first][1], tensors.get_slice(key), mesh, parts.get(first, ()))

    def place_of(self, names: list[str]) -> str:
        """See Checkpoint."""
        return str(self._file_of[self._key(names)])

    def _key(self, names: list[str]) -> str:
        return next(name for name in names if name in self._file_of)

    def _require_index(self) -> None:
        """Every tensor must be where the index says."""
        index = self._place / INDEX
        if not index.is_file():
            return
        for key, name in _weight_map(index).items():
            if self._file_of.get(key) != self._place / name:
                raise IllegalModel(f"{str(self._place / name)!r} has no {key!r}", legal=f"what {str(index)!r} says")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IllegalModel(f"{str(index)!r}: {error}", legal="a file of JSON that can be read") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise IllegalModel(f"{str(index)!r} has no weight_map", legal='{"weight_map": {tensor: file, ...}}')
    return names


@contextmanager
def _opened(file: Path, named_by: Path) -> Iterator[Any]:
    """The tensors of a file; whatever is wrong with it names it."""
    from safetensors import SafetensorError, safe_open

    require_plain_file(file, named_by)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise IllegalModel(f"{str(file)!r}: {error}", legal="a whole file of safetensors") from error


def _fill(value: Tensor, stored: Any, mesh: DeviceMesh, parts: tuple[Part, ...]) -> None:
    at = [slice(None)] * value.ndim
    for part in parts:
        size = value.shape[part.dim] // part.degree
        start = mesh.get_local_rank(part.axis) * size
        at[part.dim] = slice(start, start + size)
    with torch.no_grad():
        local = value.to_local() if isinstance(value, DTensor) else value
        local.copy_(stored[tuple(at)] if value.ndim else stored[...])
