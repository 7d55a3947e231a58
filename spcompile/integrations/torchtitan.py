"""A `parallelize_fn` for torchtitan: a plain model over a mesh, in the place of a plan of its layers.

    spec = replace(spec, parallelize_fn=parallelize_over({"cp": 8}, attention="ulysses"))
    --parallelism.tensor_parallel_degree 8 --compile.components loss

torchtitan gives the ranks of its axis `tp` the same batches, whole, which is what a mesh of this project wants,
whatever axes it has. Its axis `cp` is not used: there torchtitan cuts the batch itself. Written by the call of
`ModelSpec.parallelize_fn`; torchtitan need not be installed to import this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from spcompile.diagnostics import IllegalMesh, IllegalOption
from spcompile.integrations.batch_mesh import BatchMesh
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options

_OTHERS = ("dp_replicate", "cp", "pp", "ep")


def parallelize_over(mesh: Mapping[str, int] | None = None, **options: Any) -> Callable[..., nn.Module]:
    """What `ModelSpec.parallelize_fn` takes. It compiles the model in place: parameters stay plain, and whole.

    With `--parallelism.data_parallel_shard_degree` FSDP2 then shards the model over that axis, as one unit.

    mesh: sizes of `cp` and `tp`, of as many ranks as `--parallelism.tensor_parallel_degree` says; default: all on `cp`.
    options: those of the backend, but `mesh`.

    Raises:
        IllegalMesh, IllegalOption, UnknownOption: at once, what the backend would raise. When torchtitan calls it:
            degrees of other axes, another number of ranks, or what torchtitan would apply to the model besides.
    """
    if mesh is not None:
        MeshShape.of(mesh)
    Options.parse(options)

    def parallelize(model: nn.Module, *, parallel_dims: Any, **configs: Any) -> nn.Module:
        _require_free(parallel_dims, configs)
        sizes = dict(mesh) if mesh is not None else {"cp": int(parallel_dims.tp)}
        data = int(parallel_dims.dp_shard)
        if prod(sizes.values()) != parallel_dims.tp or parallel_dims.world_size != data * parallel_dims.tp:
            found = f"{sizes} with tensor_parallel_degree {parallel_dims.tp} of {parallel_dims.world_size} processes"
            raise IllegalMesh(found, legal="a mesh of as many ranks as tensor_parallel_degree, times those of data")
        if parallel_dims.tp > 1:
            batches = _same_ranks({"dp": data, **sizes} if data > 1 else sizes, parallel_dims)
            model.compile(backend="spcompile", options=batches.backend_options(options))
        if data > 1:
            _shard_over_data(model, parallel_dims, configs.get("training"))
        return model

    return parallelize


def _same_ranks(sizes: Mapping[str, int], parallel_dims: Any) -> BatchMesh:
    theirs = parallel_dims.get_mesh("tp")
    batches = BatchMesh.over(sizes, theirs.device_type, parallel_dims.world_size)
    assert batches.device_mesh is not None
    ours = batches.device_mesh[batches.own_axes] if "dp" in batches.axes else batches.device_mesh
    if ours.mesh.flatten().tolist() != theirs.mesh.flatten().tolist():
        raise IllegalMesh(f"torchtitan's tp over ranks {theirs.mesh.tolist()}", legal="neighbouring ranks")
    return batches


def _shard_over_data(model: nn.Module, parallel_dims: Any, training: Any) -> None:
    """Gradients are summed, since torchtitan divides its losses by the tokens of all ranks."""
    types = {name: getattr(training, f"mixed_precision_{name}", None) for name in ("param", "reduce")}
    policy = MixedPrecisionPolicy(**{f"{name}_dtype": getattr(torch, type_) for name, type_ in types.items() if type_})
    sharded: Any = fully_shard(model, mesh=parallel_dims.get_mesh("fsdp"), mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no sum of multiples, and here there are none


def _require_free(parallel_dims: Any, configs: Mapping[str, Any]) -> None:
    """Raises where torchtitan would be asked to do to the model what this does, or to cut batches."""
    for name in _OTHERS:
        if getattr(parallel_dims, name, 1) > 1:
            legal = (
                "tensor_parallel_degree and data_parallel_shard_degree, with the axes of the mesh in parallelize_over"
            )
            raise IllegalMesh(f"torchtitan's {name} = {getattr(parallel_dims, name)}", legal=legal)
    compiled = configs.get("compile_config")
    if compiled is not None and compiled.enable and "model" in compiled.components:
        raise IllegalOption("compile.components with model: it is compiled here", legal="--compile.components loss")
    checkpointing = configs.get("ac_config")
    if checkpointing is not None and checkpointing.mode != "none":
        legal = '"none", and memory="min" or a budget in parallelize_over'
        raise IllegalOption(f"activation_checkpoint.mode={checkpointing.mode!r}", legal=legal)
