"""A model's own constructor, run on real tensors while no process ever holds all of them.

    with streamed_construction(mesh) as stream:
        model = build()
    part = stream.take(parameter)

Every parameter is whole while it is worked on. When others are, each rank keeps a slice of its bytes and frees its
storage; the next access through a module gathers it again. All ranks run the same constructor from the same seed, so
each parameter gets the values it would get in a plain run, draw for draw.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.module import register_module_parameter_registration_hook

from spcompile.diagnostics import IllegalModel

KEPT = 4  # parameters that are whole at the same time: an initialiser works on those of one module
_READS_ALL = ("_apply", "state_dict", "load_state_dict")  # these pass by the hooks, on storages that may be free


@dataclass
class _Entry:
    """One parameter's storage. nbytes: its size when whole; slice: this rank's bytes, while it is not."""

    storage: torch.UntypedStorage
    nbytes: int
    slice: Tensor | None = None


class Stream:
    """The parameters of a model under construction. Slices are cut over the longest axis of the mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        names = mesh.mesh_dim_names or ()
        axis = max(names, key=lambda name: mesh[name].size())
        self._group = mesh.get_group(axis)
        self._rank, self._ranks = mesh.get_local_rank(axis), mesh[axis].size()
        self._device = mesh.device_type
        self._entries: dict[int, _Entry] = {}
        self._whole: OrderedDict[int, None] = OrderedDict()

    def touch(self, parameter: Any) -> None:
        """Make a parameter whole, and cut those that were not touched for longest."""
        if not isinstance(parameter, nn.Parameter) or parameter.is_meta:
            return
        storage = parameter.untyped_storage()
        key = storage._cdata
        entry = self._entries.setdefault(key, _Entry(storage, storage.nbytes()))
        if entry.slice is not None:
            self._gather(entry)
        self._whole[key] = None
        self._whole.move_to_end(key)
        while len(self._whole) > KEPT:
            oldest, _ = self._whole.popitem(last=False)
            self._cut(self._entries[oldest])

    def take(self, parameter: nn.Parameter, part_of: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy of a part of a parameter that is not needed any more: its storage is freed."""
        self.touch(parameter)
        part = part_of(parameter.detach()).clone(memory_format=torch.contiguous_format)
        key = parameter.untyped_storage()._cdata
        del self._whole[key]
        self._entries.pop(key).storage.resize_(0)
        return part

    def _cut(self, entry: _Entry) -> None:
        share = -(-entry.nbytes // self._ranks)
        entry.storage.resize_(share * self._ranks)
        entry.slice = _as_bytes(entry.storage)[self._rank * share : (self._rank + 1) * share].clone()
        entry.storage.resize_(0)

    def _gather(self, entry: _Entry) -> None:
        assert entry.slice is not None
        entry.storage.resize_(entry.slice.numel() * self._ranks)
        whole = _as_bytes(entry.storage)
        if self._device == entry.storage.device.type:
            dist.all_gather_into_tensor(whole, entry.slice, group=self._group)
        else:
            gathered = torch.empty(whole.numel(), dtype=torch.uint8, device=self._device)
            dist.all_gather_into_tensor(gathered, entry.slice.to(self._device), group=self._group)
            whole.copy_(gathered)
        entry.slice = None


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextlib.contextmanager
def streamed_construction(mesh: DeviceMesh) -> Iterator[Stream]:
    """Follow the parameters that are registered and read inside. Collective: all ranks of the mesh do the same.

    Raises:
        IllegalModel: the constructor converts, saves or loads a whole module.
    """
    stream = Stream(mesh)
    read, listed, copied = nn.Module.__getattr__, nn.Module.named_parameters, nn.Parameter.__deepcopy__

    def getattr_(self: nn.Module, name: str) -> Any:
        value = read(self, name)
        stream.touch(value)
        return value

    def named_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in listed(self, *args, **kwargs):
            stream.touch(parameter)
            yield name, parameter

    def deepcopy(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
        stream.touch(self)
        return copied(self, memo)

    with contextlib.ExitStack() as stack:
        hook = register_module_parameter_registration_hook(lambda module, name, parameter: stream.touch(parameter))
        stack.callback(hook.remove)
        patches: dict[str, Any] = {name: _refuse(name) for name in _READS_ALL}
        patches |= {"__getattr__": getattr_, "named_parameters": named_parameters}
        for name, patch in patches.items():
            stack.enter_context(mock.patch.object(nn.Module, name, patch))
        stack.enter_context(mock.patch.object(nn.Parameter, "__deepcopy__", deepcopy))
        yield stream


@contextlib.contextmanager
def construction_without_parameters() -> Iterator[None]:
    """Parameters that are registered inside lie on `meta`: only buffers are made."""

    def on_meta(module: nn.Module, name: str, parameter: Any) -> Any:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    register: Any = register_module_parameter_registration_hook  # typed as if hooks returned nothing
    hook = register(on_meta)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        hook.remove()


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise IllegalModel(
            f"the constructor of {type(self).__name__} calls {name} on a whole module, whose parameters are streamed",
            legal="a constructor that makes parameters on their device and in their dtype",
        )

    return refuse
