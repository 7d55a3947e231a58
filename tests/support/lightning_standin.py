"""The interface of Lightning's DDP strategies that ours build on, and nothing else of it: read from lightning 2.6.

Where lightning is installed, tests of the same strategies run with it.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Metric(nn.Module):
    """Of torchmetrics: which processes its state is collected from."""

    process_group: Any = None
    distributed_available_fn: Any = None


class _SkipsAveraging:
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Any:
        if not isinstance(module, DistributedDataParallel):
            raise TypeError("a module without DDP")
        return module.no_sync() if enabled else contextlib.nullcontext()


class _Strategy:
    def __init__(self, **kwargs: Any) -> None:
        self._ddp_kwargs = kwargs
        self._backward_sync_control = _SkipsAveraging()
        self.root_device = torch.device("cpu")

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def setup_environment(self) -> None:
        """Where Lightning makes the process group, which is here already."""

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, tensor, group=group)
        return torch.stack(found)

    def _mean(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        dist.all_reduce(tensor, group=group)
        return tensor / dist.get_world_size(group) if reduce_op == "mean" else tensor


class TrainerStrategy(_Strategy):
    """`lightning.pytorch.strategies.DDPStrategy`, in the order in which the Trainer calls it."""

    model: nn.Module
    lightning_module: Any

    def connect(self, model: Any) -> None:
        self.lightning_module = self.model = model

    def setup(self, trainer: Any) -> None:
        self.model_to_device()
        self.configure_ddp()

    def model_to_device(self) -> None:
        self.model.to(self.root_device)

    def configure_ddp(self) -> None:
        self.model = DistributedDataParallel(self.model, **self._ddp_kwargs)

    def training_step(self, batch: Any, at: int) -> Any:
        module = self.lightning_module
        if self.model is module:
            return module.training_step(batch, at)
        whole = module.forward

        def step(*given: Any) -> Any:
            module.forward = whole
            return module.training_step(*given)

        module.forward = step
        return self.model(batch, at)

    reduce = _Strategy._mean


class FabricStrategy(_Strategy):
    """`lightning.fabric.strategies.DDPStrategy`."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module, **self._ddp_kwargs)

    all_reduce = _Strategy._mean


@contextlib.contextmanager
def standing_in() -> Iterator[Any]:
    """Gives spcompile.integrations.lightning, imported with the stand-in in the place of lightning and torchmetrics."""
    ours = "spcompile.integrations.lightning"
    contents: dict[str, dict[str, Any]] = {
        "lightning": {},
        "lightning.fabric": {},
        "lightning.fabric.strategies": {"DDPStrategy": FabricStrategy},
        "lightning.pytorch": {},
        "lightning.pytorch.strategies": {"DDPStrategy": TrainerStrategy},
        "torchmetrics": {"Metric": Metric},
    }
    made = {name: types.ModuleType(name) for name in contents}
    for name, members in contents.items():
        vars(made[name]).update(members)
    # Not all that was loaded is put back: what torch loads meanwhile stays.
    kept = {name: sys.modules.pop(name) for name in [*made, ours] if name in sys.modules}
    sys.modules.update(made)
    try:
        __import__(ours)
        yield sys.modules[ours]
    finally:
        for name in [*made, ours]:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
