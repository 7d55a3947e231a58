"""Gives a model its DTensor parameters: cut from whole ones, made by its constructor, or read from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from spcompile.diagnostics import IllegalModel
from spcompile.machine.shared_failure import failing_together
from spcompile.parameters.checkpoints import checkpoint_for, load_parameters
from spcompile.parameters.sharded_modules import as_parameter, install, local_part, local_shape
from spcompile.parameters.streamed_init import construction_without_parameters, streamed_construction
from spcompile.sharding.global_view import Part

Parts = Mapping[str, tuple[Part, ...]]


def is_on_meta(model: nn.Module) -> bool:
    """Whether a parameter has no data yet."""
    return any(p.is_meta for p in model.parameters())


def shard_in_place(
    model: nn.Module, mesh: DeviceMesh, parts: Parts, part_of: Callable[[str, nn.Parameter], Tensor]
) -> None:
    """Replace every parameter by the DTensor whose local part is `part_of(name, parameter)`; tied ones stay tied."""
    names = {id(p): name for name, p in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    kept = list(model.parameters())  # an id must not be used again
    for module in list(model.modules()):
        own: dict[str, nn.Parameter] = {}
        for attribute, old in module._parameters.items():
            if old is None:
                continue
            name = names[id(old)]
            if id(old) not in made:
                made[id(old)] = as_parameter(part_of(name, old), old, parts[name], mesh)
            own[attribute] = made[id(old)]
        install(module, own, {attribute: parts[names[id(module._parameters[attribute])]] for attribute in own})
    del kept


def shard_real(model: nn.Module, mesh: DeviceMesh, parts: Parts) -> None:
    """Cut this rank's part out of every parameter."""

    def part_of(name: str, parameter: nn.Parameter) -> Tensor:
        return local_part(parameter.detach(), parts[name], mesh).clone(memory_format=torch.contiguous_format)

    shard_in_place(model, mesh, parts, part_of)


def construct(model: nn.Module, mesh: DeviceMesh, parts: Parts, build: Callable[[], nn.Module]) -> None:
    """Fill a model on `meta` from what `build` makes, one parameter after the other."""
    with streamed_construction(mesh) as stream:
        built = build()
    made = dict(built.named_parameters())
    _require_like(model, built)

    def part_of(name: str, parameter: nn.Parameter) -> Tensor:
        part = stream.take(made.pop(name), lambda whole: local_part(whole, parts[name], mesh))
        return part.to(mesh.device_type)

    _copy_other_tensors(built, model, mesh)
    shard_in_place(model, mesh, parts, part_of)


def fill_from_checkpoint(
    model: nn.Module, mesh: DeviceMesh, parts: Parts, checkpoint: Path, build: Callable[[], nn.Module] | None
) -> None:
    """Fill a model on `meta` from a checkpoint; buffers that checkpoints leave out come from `build`.

    Raises:
        IllegalModel: on all ranks, where one cannot read it or build the model.
    """
    found = checkpoint_for(model, checkpoint, mesh)
    if build is not None:
        with failing_together(mesh, IllegalModel):
            with construction_without_parameters():
                built = build()
            _require_like(model, built)
        _copy_other_tensors(built, model, mesh)

    def part_of(name: str, parameter: nn.Parameter) -> Tensor:
        shape = local_shape(parameter.shape, parts[name])
        return torch.empty(shape, dtype=parameter.dtype, device=mesh.device_type)

    shard_in_place(model, mesh, parts, part_of)
    load_parameters(model, found, mesh, parts)


def constructor_of(model: nn.Module) -> Callable[[], nn.Module] | None:
    """How a transformers model is built again, which its config says; None for other models.

    Its random numbers are drawn in its parameters' dtype, as `from_config(dtype=...)` does.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "_from_config") or getattr(type(model), "config_class", None) is None:
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def build() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return type(model)(copy.deepcopy(config))
        finally:
            torch.set_default_dtype(before)

    return build


def _require_like(model: nn.Module, built: nn.Module) -> None:
    """The model that was built must have the same parameters and buffers."""
    wanted, found = _signature(model), _signature(built)
    if wanted != found:
        name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise IllegalModel(
            f"what was built has {found.get(name)} for {name!r}, the model on meta {wanted.get(name)}",
            legal="initialize=: a function that builds the same model",
        )


def _signature(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (tuple(x.shape), x.dtype) for name, x in named}


def _copy_other_tensors(built: nn.Module, model: nn.Module, mesh: DeviceMesh) -> None:
    """Buffers, and tensors that are plain attributes, of the model that was built."""
    others = dict(built.named_modules())
    for name, module in model.named_modules():
        for values, given in ((module._buffers, others[name]._buffers), (module.__dict__, others[name].__dict__)):
            for key, tensor in _on_meta(values):
                values[key] = given[key].to(mesh.device_type) if given[key] is not None else None
                del tensor


def _on_meta(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return iter([(k, v) for k, v in values.items() if isinstance(v, Tensor) and v.is_meta])
