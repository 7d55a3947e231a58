"""Checkpoints of torch.distributed.checkpoint: a folder with files of data and one of metadata.

The metadata is a pickle, which torch reads as one: loading it runs what it says. That is the format; a folder that
somebody else may have written must not be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh

from spcompile.diagnostics import IllegalModel
from spcompile.parameters.stored import Targets, inside, require_like, require_plain_file
from spcompile.sharding.global_view import Part


class DcpFolder:
    """A folder whose metadata has been read."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / ".metadata"
        self._metadata = self._read()

    def require(self, targets: Targets) -> set[str]:
        """See Checkpoint."""
        saved = self._metadata.state_dict_metadata
        read = set()
        for names, value in targets.values():
            key = self._key(names)
            read.add(key)
            stored = saved[key]
            if not isinstance(stored, TensorStorageMetadata):
                raise IllegalModel(f"{key!r} is no tensor in {str(self._file)!r}")
            require_like(key, stored.size, stored.properties.dtype, value, self._file)
            self._require_data(key, stored)
        tensors = {key for key, stored in saved.items() if isinstance(stored, TensorStorageMetadata)}
        return {key for key in tensors - read if not key.startswith("optim")}

    def fill(self, targets: Targets, mesh: DeviceMesh, parts: Mapping[str, tuple[Part, ...]]) -> None:
        """See Checkpoint. Where one rank fails, torch raises on all."""
        import torch.distributed.checkpoint as dcp

        wanted: dict[str, Tensor] = {self._key(names): value.detach() for names, value in targets.values()}
        try:
            dcp.load(wanted, checkpoint_id=self._folder)
        except CheckpointException as error:
            _, (reason, _) = min(error.failures.items())
            found = f"{str(self._folder)!r}: {type(reason).__name__}: {reason}"
            raise IllegalModel(found, legal="whole files of torch.distributed.checkpoint") from None

    def place_of(self, names: list[str]) -> str:
        """See Checkpoint."""
        return str(self._folder)

    def _read(self) -> Metadata:
        import torch.distributed.checkpoint as dcp

        try:
            found: Any = dcp.FileSystemReader(self._folder).read_metadata()
        except Exception as error:
            text = f"{str(self._file)!r}: {type(error).__name__}: {error}"
            raise IllegalModel(text, legal="the metadata that torch.distributed.checkpoint writes") from error
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise IllegalModel(
                f"{str(self._file)!r} holds {type(found).__name__}", legal="metadata with places in files"
            )
        return found

    def _key(self, names: list[str]) -> str:
        for name in names:
            for key in (name, f"model.{name}"):  # dcp.save(model.state_dict()), dcp.save({"model": model.state_dict()})
                if key in self._metadata.state_dict_metadata:
                    return key
        raise IllegalModel(f"checkpoint {str(self._folder)!r} has no {names[0]!r}")

    def _require_data(self, key: str, stored: TensorStorageMetadata) -> None:
        """Chunks must make up the tensor, and lie in files that are long enough."""
        there = sum(prod(chunk.sizes) for chunk in stored.chunks)
        if there != prod(stored.size):
            raise IllegalModel(f"{str(self._file)!r} has {there} of {prod(stored.size)} numbers of {key!r}")
        for chunk in stored.chunks:
            place = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if place is None:
                raise IllegalModel(f"{str(self._file)!r} does not say where a part of {key!r} is")
            file = inside(self._folder, place.relative_path, self._file)
            size = require_plain_file(file, self._file)
            if size < place.offset + place.length:
                legal = f"at least {place.offset + place.length}, by {str(self._file)!r}"
                raise IllegalModel(f"{str(file)!r} has {size} bytes", legal=legal)
