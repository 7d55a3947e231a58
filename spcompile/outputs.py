"""The outputs a user gets: whole tensors, DTensors over the sequence, or an error for what was not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from spcompile import sequence
from spcompile.diagnostics import NotComputed
from spcompile.mesh import RuntimeMesh
from spcompile.program import LocalProgram, Output


class NotComputedTensor(torch.Tensor):
    """Stands for an output that outputs="loss" does not compute: any use is an error that says so."""

    @staticmethod
    def __new__(cls) -> NotComputedTensor:
        return torch.Tensor._make_subclass(cls, torch.empty(0))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotComputed(
            f'this output was read by {getattr(func, "__name__", func)}, but outputs="loss" computes scalars only',
            legal='outputs="full" or "sharded"',
        )


def restore_outputs(compiled: Callable[..., Any], program: LocalProgram, mesh: RuntimeMesh) -> Callable[..., Any]:
    """Wrap a compiled local graph so that it returns what the user's graph returns, in order."""
    if all(o.index == i and o.dim is None for i, o in enumerate(program.outputs)):
        return compiled

    def run(*args: Any) -> list[Any]:
        computed = compiled(*args)
        return [_restore(output, computed, mesh) for output in program.outputs]

    return run


def _restore(output: Output, computed: Any, mesh: RuntimeMesh) -> Any:
    if output.index is None:
        return NotComputedTensor()
    value = computed[output.index]
    return value if output.dim is None else _as_dtensor(value, output, mesh)


def _as_dtensor(local: Tensor, output: Output, mesh: RuntimeMesh) -> DTensor:
    """A DTensor split over the sequence: DTensor's uneven shards hold no padding, so it is cut off."""
    assert output.dim is not None
    assert output.shape is not None
    axis = "cp"
    rank = mesh.device_mesh.get_local_rank(axis)
    length = int(output.shape[output.dim])
    chunk = sequence.chunk_length(length, mesh.shape.size(axis), "contiguous")
    valid = max(0, min(chunk, length - rank * chunk))
    placements: list[Placement] = [Shard(output.dim) if name == axis else Replicate() for name, _ in mesh.shape.axes]
    shape = torch.Size(int(s) for s in output.shape)
    stride = torch.empty(shape, device="meta").stride()
    part = local.narrow(output.dim, 0, valid)
    return DTensor.from_local(part, mesh.device_mesh, placements, run_check=False, shape=shape, stride=stride)
