"""What a checkpoint stores against what a model has: shapes, dtypes, and files that lie where they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from spcompile.diagnostics import IllegalModel

Targets = Mapping[str, tuple[list[str], Tensor]]  # first name -> (all names of a tensor, the tensor)
_ROUNDED = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_COMPLEX = {torch.complex32, torch.complex64, torch.complex128}


def require_like(key: str, shape: Sequence[int], dtype: torch.dtype | str, value: Tensor, place: Path) -> None:
    """The stored tensor must have the shape of the model's, and a dtype that keeps its meaning there.

    dtype: a str where torch has none.

    Raises:
        IllegalModel: it has not. Floats may be rounded to floats; nothing else is converted.
    """
    if tuple(shape) != tuple(value.shape):
        raise IllegalModel(f"{key!r} has shape {tuple(shape)} in {str(place)!r}", legal=str(tuple(value.shape)))
    rounded = any({dtype, value.dtype} <= kind for kind in (_ROUNDED, _COMPLEX))
    if dtype != value.dtype and not rounded:
        legal = "float16, bfloat16, float32, float64" if value.dtype in _ROUNDED else _dtype_name(value.dtype)
        raise IllegalModel(
            f"{key!r} is {_dtype_name(dtype)} in {str(place)!r}, {_dtype_name(value.dtype)} in the model", legal=legal
        )


def inside(folder: Path, name: object, named_by: Path) -> Path:
    """The file of a folder that an index names.

    Raises:
        IllegalModel: the name points out of the folder.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise IllegalModel(f"{str(named_by)!r} names the file {name!r}", legal=f"files in {str(folder)!r}")
    return folder / name


def require_plain_file(file: Path, named_by: Path) -> int:
    """The size of a file.

    Raises:
        IllegalModel: there is none, or it is no plain file.
    """
    if not file.is_file():
        found = "is no plain file" if file.exists() else "does not exist"
        raise IllegalModel(f"{str(file)!r} {found}", legal=f"all files that {str(named_by)!r} needs")
    return file.stat().st_size


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
