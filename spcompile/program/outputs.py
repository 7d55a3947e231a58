"""The outputs a user gets: whole tensors, DTensors over the sequence, or an error for what was not computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from spcompile.diagnostics import NotComputed
from spcompile.machine import sequence
from spcompile.machine.mesh import RuntimeMesh
from spcompile.program.build import Output


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


def restore_outputs(
    compiled: Callable[..., Any], outputs: Sequence[Output], mesh: RuntimeMesh, *, as_dtensors: bool
) -> Callable[..., Any]:
    """Wrap a compiled local graph so that it returns what the user's graph returns, in order.

    as_dtensors: what is split stays so (outputs="sharded").
    """
    if all(o.index == i and not (o.dims and as_dtensors) for i, o in enumerate(outputs)):
        return compiled

    def run(*args: Any) -> list[Any]:
        computed = compiled(*args)
        return [_restore(output, computed, mesh, as_dtensors) for output in outputs]

    return run


def _restore(output: Output, computed: Any, mesh: RuntimeMesh, as_dtensors: bool) -> Any:
    if output.index is None:
        return NotComputedTensor()
    value = computed[output.index]
    return _as_dtensor(value, output, mesh) if as_dtensors and output.dims else value


def _as_dtensor(local: Tensor, output: Output, mesh: RuntimeMesh) -> DTensor:
    """A DTensor split over the sequence and the batch: its uneven shards hold no padding, so it is cut off."""
    assert output.shape is not None
    shape = torch.Size(int(s) for s in output.shape)
    for axis, dim in output.dims.items():
        chunk = sequence.chunk_length(shape[dim], mesh.shape.size(axis), "contiguous")
        valid = max(0, min(chunk, shape[dim] - mesh.device_mesh.get_local_rank(axis) * chunk))
        local = local.narrow(dim, 0, valid)
    dims = output.dims
    placements: list[Placement] = [Shard(dims[name]) if name in dims else Replicate() for name, _ in mesh.shape.axes]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh.device_mesh, placements, run_check=False, shape=shape, stride=stride)
