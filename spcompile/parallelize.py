"""`spcompile.parallelize`: shard a model's parameters in place, then compile it. Imports nothing until it is called."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.fx as fx
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from spcompile.machine.mesh import MeshShape
    from spcompile.options import Options
    from spcompile.parameters.weight_plan import WeightPlan
    from spcompile.program.build import LocalProgram

log = logging.getLogger(__name__)


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | Mapping[str, int],
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    shard_parameters: str | Sequence[str] | None = None,
    initialize: Callable[[], nn.Module] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Shard the parameters of a model over a mesh, in place and under their names, and compile it.

    Every parameter becomes a DTensor on `mesh`: split over `tp` as the compiled program splits it, and over the axes
    `shard_parameters` wherever a dim divides (ZeRO-3, Rajbhandari et al. 2020: gathered just before use, gradients
    reduce-scattered). `tp` among them splits those matrices too that the program reads in other parts than they would
    be stored in, such as fused projections: less memory at rest, one gather more in each step. Called by all ranks of
    the mesh, before optimizers are made.

    mesh: as the option `mesh`.
    model: real weights, equal on all ranks, of which each keeps its parts; or on `meta`, to be made part by part.
    example_inputs: keyword arguments (a dict) or positional ones of one training step. Not computed with, unless the
        model is not one graph.
    shard_parameters: None, or axes of the mesh: "cp", "dp", "tp", or several of them.
    initialize: for a model on `meta`: builds the same model on real tensors. It runs on all ranks, from the same seed,
        and no rank ever holds all that it makes. A transformers model needs none: its config says how to build it.
    checkpoint: for a model on `meta`: a folder of torch.distributed.checkpoint, or safetensors, to read parts from.
    options: those of the backend, but `mesh`.

    Returns the model, compiled by `model.compile`. Its `save_pretrained`, if any, writes whole weights; all ranks
    call it.

    Raises:
        SpcompileError: an illegal mesh, option or axis, a model that is parallelized already, one on `meta` that
            nothing can fill, or what `explain` raises. Before any collective, but for errors in `initialize`.
    """
    from pathlib import Path

    from spcompile.options import Options
    from spcompile.parameters.materialize import construct, constructor_of, fill_from_checkpoint, is_on_meta, shard_real
    from spcompile.parameters.whole_weights import save_whole
    from spcompile.plain_text import one_line
    from spcompile.program.trace import mesh_shape

    mesh = _device_mesh(mesh, example_inputs)
    shape, chosen = mesh_shape(mesh), Options.parse({**options, "mesh": mesh})
    on_meta = is_on_meta(model)
    build = initialize or (constructor_of(model) if on_meta else None)
    axes = (shard_parameters,) if isinstance(shard_parameters, str) else tuple(shard_parameters or ())
    _check(model, shape, axes, on_meta, initialize, checkpoint)
    _check_source(on_meta, build, checkpoint)
    plan = planned_weights(model, example_inputs, shape, chosen, axes)
    for name, reason in plan.whole.items():
        log.info("SPR502 every rank of tp holds all of %s: %s", one_line(name), one_line(reason))
    if not on_meta:
        shard_real(model, mesh, plan.parts)
    elif checkpoint is not None:
        fill_from_checkpoint(model, mesh, plan.parts, Path(checkpoint), build)
    else:
        assert build is not None
        construct(model, mesh, plan.parts, build)
    save_whole(model)
    model.compile(backend="spcompile", options={**options, "mesh": mesh})
    return model


def _device_mesh(mesh: DeviceMesh | Mapping[str, int], example_inputs: Any) -> DeviceMesh:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from spcompile.diagnostics import IllegalMesh
    from spcompile.machine.mesh import LEGAL_MESH, mesh_of_sizes

    if isinstance(mesh, Mapping):
        given = [x for x in torch.utils._pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        usual = there.type if there is not None else "cpu"
        return mesh_of_sizes(mesh, next((x.device.type for x in given if not x.is_meta), usual))
    if not isinstance(mesh, DeviceMesh):
        raise IllegalMesh(f"mesh={mesh!r}", legal=LEGAL_MESH)
    return mesh


def planned_weights(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    shape: MeshShape,
    options: Options,
    axes: Sequence[str],
) -> WeightPlan:
    """What `parallelize` makes of each parameter, with `axes` for shard_parameters. Computes nothing."""
    from spcompile.parameters.weight_plan import weight_plan

    split = _split_over_tp(model, example_inputs, shape, options) if shape.size("tp") > 1 else {}
    return weight_plan(model, split, dict(shape.axes), axes)


def require_axes(axes: Sequence[str], shape: MeshShape) -> None:
    """Raises IllegalOption where `shard_parameters` names an axis that the mesh does not have."""
    from spcompile.diagnostics import IllegalOption

    for axis in axes:
        if axis not in dict(shape.axes):
            legal = ", ".join(["None", *(repr(name) for name, _ in shape.axes)])
            raise IllegalOption(f"shard_parameters={axis!r} on a mesh {shape}", legal=legal)


def _check(
    model: nn.Module, shape: MeshShape, axes: Sequence[str], on_meta: bool, initialize: object, checkpoint: object
) -> None:
    from torch.distributed.tensor import DTensor

    from spcompile.diagnostics import IllegalModel, IllegalOption

    require_axes(axes, shape)
    sharded = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise IllegalModel(f"parameter {sharded} is a DTensor already", legal="a model that is not parallelized yet")
    given = [n for n, value in (("initialize", initialize), ("checkpoint", checkpoint)) if value is not None]
    if given and not on_meta:
        raise IllegalOption(
            f"{given[0]}= for a model with real weights", legal="a model built under torch.device('meta')"
        )
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise IllegalOption(f"checkpoint={checkpoint!r}", legal="a path")


def _check_source(on_meta: bool, build: object, checkpoint: object) -> None:
    from spcompile.diagnostics import IllegalModel

    if on_meta and build is None and checkpoint is None:
        raise IllegalModel(
            "its parameters are on meta, and nothing says what they are",
            legal="initialize=: a function that builds the same model on real tensors; or checkpoint=",
        )


def _split_over_tp(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any], shape: MeshShape, options: Options
) -> dict[str, int | str]:
    """Parameter name -> the dim that tp splits, or why it splits none. Computes nothing but parts of a broken model."""
    from contextlib import nullcontext
    from dataclasses import replace

    import torch

    from spcompile.capture.meta_device import off_meta
    from spcompile.parameters.materialize import is_on_meta
    from spcompile.parameters.weight_plan import PLANNED, split_over_tp
    from spcompile.passes import PIPELINE
    from spcompile.program.build import build
    from spcompile.program.plugins import with_plugins
    from spcompile.program.trace import through_dynamo
    from spcompile.program.whole_batch import over_whole_batch
    from spcompile.report.put_back import put_back

    pipeline = with_plugins(PIPELINE, options)
    passes = pipeline[: [p.name for p in pipeline].index(PLANNED) + 1]
    known = {p.name for p in passes}
    options = replace(options, passes={name: wish for name, wish in options.passes.items() if name in known})
    found: dict[str, int | str] = {}
    if is_on_meta(model):
        model, example_inputs = _fakes_of(model, example_inputs)
    names = {id(p): name for name, p in model.named_parameters()}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        program: LocalProgram = build(*off_meta(gm, inputs), shape, options, passes)
        for value, split in zip(inputs, split_over_tp(program.gm.graph, shape.size("tp")), strict=True):
            if id(value) in names:
                found[names[id(value)]] = split

    kept = put_back(model, example_inputs) if options.on_graph_break == "gather" else nullcontext()
    with torch.enable_grad(), kept:
        through_dynamo(model, example_inputs, over_whole_batch(backend, shape.size("dp")), options, shape.size("dp"))
    return found


def _fakes_of(model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any]) -> tuple[nn.Module, Any]:
    """Copies of a model on meta and of inputs, all of it fake, on the inputs' device.

    Tracing on meta itself would fail where a model mixes devices, or uses what meta has no kernel for.
    """
    import copy

    import torch
    from torch import nn
    from torch._subclasses import FakeTensorMode

    given = [x for x in torch.utils._pytree.tree_leaves(example_inputs) if isinstance(x, torch.Tensor)]
    device = next((x.device for x in given if not x.is_meta), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(x, device=device)

        memo: dict[int, Any] = {id(b): fake(b) for b in model.buffers()}
        memo |= {id(p): nn.Parameter(fake(p), p.requires_grad) for p in model.parameters()}
        return copy.deepcopy(model, memo), torch.utils._pytree.tree_map_only(torch.Tensor, fake, example_inputs)
