"""Strategies for the Trainer of Lightning, and for Fabric, over a mesh.

    trainer = Trainer(devices=2, strategy=SequenceParallelStrategy(mesh={"cp": 2}))
    fabric = Fabric(devices=2, strategy=SequenceParallelFabricStrategy(mesh={"cp": 2}))

The processes of one `tp` x `cp` group get the same batches and train as one process does, without DDP. Over `dp`
batches differ, and DDP averages gradients. Read from lightning 2.6.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from spcompile.broadcast import broadcast
from spcompile.diagnostics import IllegalModel, IllegalOption
from spcompile.integrations.batch_mesh import BatchMesh, is_sharded
from spcompile.integrations.plain_generation import generating_plainly

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Which strategy stands behind the mixin is the matter of the two classes below.
_Strategy: Any = object

# Modules that a strategy compiled: a Trainer sets up the same ones for each of fit, validate, test and predict.
_COMPILED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _no_other_batches() -> bool:
    """For torchmetrics: nothing is to be collected from other processes."""
    return False


class _BatchesOfMesh(_Strategy):
    """What both strategies have in common: who gets which batch, and over whom values are collected."""

    _ddp_kwargs: dict[str, Any]  # Lightning's, for DDP

    def __init__(
        self,
        *,
        mesh: DeviceMesh | Mapping[str, int] | None = None,
        spcompile_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if "process_group" in kwargs:
            raise IllegalOption("process_group=", legal='mesh={"dp": D, "tp": T, "cp": C}')
        self._asked_mesh, self._asked_options = mesh, spcompile_options
        self.batches = BatchMesh(None)
        self.options: dict[str, Any] = {}

    def setup_environment(self) -> None:
        """Lightning's, then the mesh is made.

        Raises:
            IllegalMesh, IllegalOption: as the backend does.
        """
        super().setup_environment()
        self.batches = BatchMesh.over(self._asked_mesh, self.root_device.type, self.world_size)
        self.options = self.batches.backend_options(self._asked_options)
        self._ddp_kwargs = {**self._ddp_kwargs, "process_group": self.batches.group}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How many different batches a step has, and which of them is this process's."""
        return {"num_replicas": self.batches.count, "rank": self.batches.index}

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Tensors of all batches of a step, stacked in a new dim 0; or those of the processes of a group."""
        group = self._group(group)
        return tensor[None] if group is None else super().all_gather(tensor, group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or any of them, have decided so: also those that share a batch."""
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(votes)

    def _group(self, asked: Any) -> Any:
        """The processes that have the batches of a step; Fabric names all processes where nobody has named any."""
        return self.batches.group if asked is None or asked is dist.group.WORLD else asked

    def _compile_over_mesh(self, whole: nn.Module, parts: Sequence[nn.Module]) -> None:
        """Everybody gets the first process's parameters and buffers; parts are compiled in place.

        Raises:
            IllegalModel: one that is compiled already, or whose parameters are sharded.
        """
        if is_sharded(whole):
            raise IllegalModel("a model whose parameters are sharded, in a strategy", legal="the plain model")
        compiled = [p for p in parts if getattr(p, "_compiled_call_impl", None) is not None and p not in _COMPILED]
        if compiled or any(isinstance(module, torch._dynamo.OptimizedModule) for module in whole.modules()):
            raise IllegalModel("a model that is compiled already", legal="the plain model, which the strategy compiles")
        if self.batches.device_mesh is not None:
            broadcast(whole, self.batches.device_mesh)
        for part in parts:
            generating_plainly(part)
            part.compile(backend="spcompile", options=self.options)
            _COMPILED.add(part)


class SequenceParallelStrategy(_BatchesOfMesh, DDPStrategy):
    """Of the Trainer of Lightning.

    mesh: sizes of the axes `dp`, `tp`, `cp`, the first one outermost, or a DeviceMesh; default: `cp` over all.
    spcompile_options: options of the backend, but `mesh`.
    submodules: dotted names of modules in the LightningModule that are compiled, those that steps call; default: the
        only child with parameters.
    The other arguments are those of Lightning's DDPStrategy.

    Raises:
        IllegalMesh, IllegalOption: as the backend does, when the Trainer sets up its processes.
        IllegalModel: no such submodule, or several that could be meant; one that is compiled already, or sharded.
    """

    def __init__(self, *, submodules: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._submodules = (submodules,) if isinstance(submodules, str) else submodules

    def model_to_device(self) -> None:
        """Lightning's; then the model is that of the first process, and compiled over the mesh."""
        assert self.model is not None
        if getattr(self.model, "_compiler_ctx", None) is not None:
            raise IllegalModel("a LightningModule that torch.compile has wrapped", legal="the plain LightningModule")
        parts = self._parts(self.model)
        super().model_to_device()
        self._compile_over_mesh(self.model, parts)
        for metric in (module for module in self.model.modules() if isinstance(module, Metric)):
            if metric.process_group is None:
                metric.process_group = self.batches.group
            if metric.process_group is None:
                metric.distributed_available_fn = _no_other_batches

    def setup(self, trainer: Any) -> None:
        """Lightning's; then processes that share batches draw the same random numbers."""
        super().setup(trainer)
        self.batches.share_random_states(self.root_device)

    def configure_ddp(self) -> None:
        """Lightning's where batches differ: nothing else averages gradients."""
        if self.batches.group is not None:
            super().configure_ddp()

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over all batches of a step, each once; or over the processes of a group."""
        group = self._group(group)
        return tensor if group is None else super().reduce(tensor, group, reduce_op)

    def _parts(self, model: nn.Module) -> list[nn.Module]:
        with_parameters = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        names = self._submodules if self._submodules is not None else with_parameters
        modules = dict(model.named_modules())
        legal = f"submodules= out of {', '.join(map(repr, with_parameters)) or 'its modules'}"
        if self._submodules is None and len(names) != 1:
            raise IllegalModel(f"a LightningModule with {len(names)} children that have parameters", legal=legal)
        missing = [name for name in names if not name or name not in modules]
        if missing:
            raise IllegalModel(f"submodules={[*names]}: the LightningModule has no {missing[0]!r}", legal=legal)
        return [modules[name] for name in names]


class SequenceParallelFabricStrategy(_BatchesOfMesh, FabricDDPStrategy):
    """Of Fabric, which compiles the modules that `fabric.setup` and `fabric.setup_module` get.

    Arguments and errors: as SequenceParallelStrategy, without `submodules`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        made: Any = self
        made._backward_sync_control = _SkipsDDPAlone(made._backward_sync_control)

    def setup_module(self, module: nn.Module) -> Any:
        """The module, compiled in place; in DDP where batches differ. Ranks that share them share random numbers."""
        self._compile_over_mesh(module, [module])
        self.batches.share_random_states(self.root_device)
        trained = any(p.requires_grad for p in module.parameters())
        return super().setup_module(module) if self.batches.group is not None and trained else module

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Over all batches of a step, each once; or over the processes of a group."""
        group = self._group(group)
        return tensor if group is None else super().all_reduce(tensor, group, reduce_op)


class _SkipsDDPAlone:
    """Fabric's way to skip averaging of gradients, and nothing for a module whose gradients nobody averages."""

    def __init__(self, of_ddp: Any) -> None:
        self._of_ddp = of_ddp

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        if not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return self._of_ddp.no_backward_sync(module, enabled)
