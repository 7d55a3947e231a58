"""An error of one rank, raised on all ranks of a mesh: none goes on to wait for one that has stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from spcompile.diagnostics import SpcompileError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@contextlib.contextmanager
def failing_together(mesh: DeviceMesh, otherwise: type[SpcompileError]) -> Iterator[None]:
    """All ranks of the mesh run this block to its end, or all raise the error of the first that did not.

    It must not communicate, unless what communicates fails on all ranks at once.

    otherwise: the class of what other exceptions become.
    """
    failure: SpcompileError | None = None
    cause: Exception | None = None
    try:
        yield
    except SpcompileError as error:
        failure, cause = error, error
    except Exception as error:
        failure, cause = otherwise(f"{type(error).__name__}: {error}"), error
    first = first_failure(mesh, failure)
    if first is not None:
        raise first from cause


def first_failure(mesh: DeviceMesh, failure: SpcompileError | None) -> SpcompileError | None:
    """The failure of the first rank that has one, equal on all ranks of the mesh, which all must call this."""
    import torch.distributed as dist

    from spcompile.torch_private import no_python_dispatcher, unset_fake_temporarily

    found = None if failure is None else (type(failure), failure.found, failure.where, failure.legal)
    assert mesh.mesh_dim_names is not None
    with unset_fake_temporarily(), no_python_dispatcher():
        for axis in reversed(mesh.mesh_dim_names):
            group = mesh.get_group(axis)
            of_axis = [None] * dist.get_world_size(group)
            dist.all_gather_object(of_axis, found, group=group)
            found = next((one for one in of_axis if one is not None), None)
    if found is None:
        return None
    kind, text, where, legal = found
    return kind(text, where=where, legal=legal)


def raise_first(mesh: DeviceMesh, failure: SpcompileError | None) -> NoReturn:
    """Raise on all ranks, of which at least one has a failure."""
    first = first_failure(mesh, failure)
    assert first is not None
    raise first from failure
