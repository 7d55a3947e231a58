"""An `Accelerator` whose processes form a mesh: those of one `tp` x `cp` group are one trainer.

    accelerator = SequenceParallelAccelerator(mesh={"cp": 2})
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

`prepare` gives the ranks of one group the same batches, and compiles the model over the group in place of wrapping it
in DDP. Over `dp` batches differ. There DDP averages gradients: code on top of accelerate scales its losses for that.
Read from accelerate 1.15.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedType, DynamoBackend, is_compiled_module, recursively_apply
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from spcompile.broadcast import broadcast
from spcompile.diagnostics import IllegalModel, IllegalOption
from spcompile.integrations.batch_mesh import BatchMesh, is_sharded
from spcompile.integrations.plain_generation import generating_plainly
from spcompile.parallelize import parallelize

# accelerate's names of compilers; compiled is in any case, by the option `compiler`, which two of them choose.
COMPILERS = {DynamoBackend.INDUCTOR: "inductor", DynamoBackend.EAGER: "eager"}


def without_gradients_of_inputs(model: nn.Module) -> None:
    """Take hooks off transformers' embeddings that make their outputs require gradients: Dynamo breaks a graph there.

    Checkpointing with frozen embeddings needs them where it is reentrant. Compiled, it is not, whatever the model says.
    Taken off by the name that transformers and PEFT give the hook: their own way forgets all but the last one.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]


class SequenceParallelAccelerator(Accelerator):
    """accelerate's `Accelerator` over a mesh.

    mesh: sizes of the axes `dp`, `tp`, `cp`, the first one outermost, or a DeviceMesh; default: `cp` over all ranks.
    spcompile_options: options of the backend, but `mesh`.
    The other arguments are accelerate's.

    `gather` gathers from all processes, `gather_for_metrics` each entry once. `num_processes` counts all processes;
    `num_batches` is how many batches a step has, and `batch_index` which of them is this process's.

    Raises:
        IllegalMesh: the axes do not make up the world.
        IllegalOption: an option of the backend, or a setting of accelerate's that shards otherwise.
    """

    def __init__(
        self,
        *args: Any,
        mesh: DeviceMesh | Mapping[str, int] | None = None,
        spcompile_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._counts_batches = False
        self._compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._refuse_other_sharding()
        self.batches = BatchMesh.over(mesh, self.device.type, self.num_processes)
        self.mesh = self.batches.device_mesh
        self.options = self._options(spcompile_options)
        if self.dispatch_batches:
            raise IllegalOption("dispatch_batches=True", legal="None or False: each process reads its own batches")
        self.dataloader_config.dispatch_batches = False

    @property
    def num_processes(self) -> int:
        """How many processes there are."""
        return self.num_batches if self._counts_batches else int(super().num_processes)

    @property
    def process_index(self) -> int:
        """Which of all processes this is."""
        return self.batch_index if self._counts_batches else int(super().process_index)

    @property
    def num_batches(self) -> int:
        """How many different batches one step has: the size of `dp`."""
        return self.batches.count

    @property
    def batch_index(self) -> int:
        """Which of the batches of a step this process has: its place along `dp`."""
        return self.batches.index

    @property
    def ranks_per_batch(self) -> int:
        """How many ranks work at one batch: the size of `tp` x `cp`."""
        return self.num_processes // self.num_batches

    def prepare_data_loader(self, data_loader: Any, device_placement: Any = None, **kwargs: Any) -> Any:
        """As accelerate's, with the same batches for all ranks of `tp` and `cp`."""
        self._counts_batches = True
        try:
            return super().prepare_data_loader(data_loader, device_placement, **kwargs)
        finally:
            self._counts_batches = False

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """As accelerate's, but the model is compiled over `tp` and `cp`, in place, and wrapped in DDP over `dp` only.

        Parameters and buffers become those of the first rank. A model that `parallelize` has sharded stays as it is.

        Raises:
            IllegalModel: `torch.compile` has wrapped it already.
        """
        if isinstance(model, DistributedDataParallel) and getattr(model, "_is_accelerate_prepared", False):
            return model
        if is_compiled_module(model):
            raise IllegalModel(
                "a model that torch.compile has wrapped", legal="the plain model, which prepare compiles"
            )
        model = super().prepare_model(model, device_placement, evaluation_mode=True)
        if is_sharded(model) and self.num_batches > 1:
            raise IllegalModel("a model whose parameters are sharded, over dp", legal="a mesh without dp")
        if is_sharded(model):
            generating_plainly(model)
        if not is_sharded(model) and model not in self._compiled:
            if self.mesh is not None:
                broadcast(model, self.mesh)
            without_gradients_of_inputs(model)
            generating_plainly(model)
            model.compile(backend="spcompile", options=self.options)
            self._compiled.add(model)
        if evaluation_mode or self.num_batches == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        return self._averaged_over_dp(model)

    def shard(self, model: nn.Module, inputs: Mapping[str, Any], shard_parameters: str | Sequence[str]) -> None:
        """`parallelize` a plain model in place, before it has an optimizer; parameters become those of the first rank.

        inputs: keyword arguments of one training step. shard_parameters: as there.

        Raises:
            IllegalModel: over dp. SpcompileError: what parallelize raises.
        """
        if self.mesh is None or self.num_batches > 1:
            raise IllegalModel("a model whose parameters are to be sharded, over dp", legal="a mesh without dp")
        broadcast(model, self.mesh)
        without_gradients_of_inputs(model)
        options = {name: value for name, value in self.options.items() if name != "mesh"}
        parallelize(model, self.mesh, inputs, shard_parameters=shard_parameters, **options)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As accelerate's, which steps a scheduler once for each batch of a step."""
        prepared: Any = super().prepare_scheduler(scheduler)
        if isinstance(prepared, AcceleratedScheduler) and type(prepared) is not _StepsOncePerBatch:
            self._schedulers.remove(prepared)
            times = self.num_batches if prepared.step_with_optimizer and not prepared.split_batches else 1
            prepared = _StepsOncePerBatch(prepared, times)
            self._schedulers.append(prepared)
        return prepared

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """What the processes have, each entry of a dataset once: neither those of the other ranks of `tp` and `cp`, nor
        what was repeated to fill the last batches.
        """
        if self.mesh is None:
            return super().gather_for_metrics(input_data, use_gather_object)
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
        except TypeError:
            use_gather_object = True
        remainder = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
        if use_gather_object:
            lists: list[Any] = [input_data]
            if self.num_batches > 1:
                lists = [None] * self.num_batches
                dist.all_gather_object(lists, input_data, group=self.batches.group)
            found = [entry for part in lists for entry in part]
            return found[:remainder] if remainder > 0 else found
        gathered = self.gather_batches(input_data)
        return recursively_apply(lambda x: x[:remainder], gathered) if remainder > 0 else gathered

    def gather_batches(self, input_data: Any) -> Any:
        """What the processes have, each batch of a step once, with entries that were repeated to fill it."""
        return recursively_apply(self.batches.gather, input_data, error_on_other_type=True)

    def _averaged_over_dp(self, model: nn.Module) -> nn.Module:
        kwargs = self.ddp_handler.to_kwargs() if self.ddp_handler is not None else {}
        devices = [self.device] if self.device.type != "cpu" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, process_group=self.batches.group, **kwargs)
        if self.ddp_handler is not None:
            self.ddp_handler.register_comm_hook(wrapped)
        prepared: Any = wrapped
        prepared._is_accelerate_prepared = True
        return wrapped

    def _refuse_other_sharding(self) -> None:
        others = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
        if self.distributed_type in others:
            raise IllegalOption(
                f"distributed_type={self.distributed_type.value}", legal="processes without FSDP, DeepSpeed"
            )
        if self.parallelism_config is not None:
            raise IllegalOption("parallelism_config=", legal='mesh={"dp": D, "tp": T, "cp": C}')

    def _options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """The backend's options; compilers that accelerate was told to use are taken over by it."""
        plugin = self.state.dynamo_plugin
        asked = {**(given or {})}
        if plugin.backend != DynamoBackend.NO:
            if plugin.backend not in COMPILERS:
                legal = ", ".join(repr(name) for name in COMPILERS.values())
                raise IllegalOption(f"dynamo_backend={plugin.backend.value.lower()!r}", legal=legal)
            if plugin.mode not in (None, "default") or plugin.use_regional_compilation:
                raise IllegalOption(
                    f"torch.compile with {plugin.to_kwargs()}", legal="no mode, no regional compilation"
                )
            asked = {"compiler": COMPILERS[plugin.backend], **asked}
            plugin.backend = DynamoBackend.NO
        return self.batches.backend_options(asked)


class _StepsOncePerBatch(AcceleratedScheduler):
    """A scheduler that is stepped for the batches of a step, where accelerate's is stepped for the processes."""

    def __init__(self, prepared: AcceleratedScheduler, times: int) -> None:
        super().__init__(prepared.scheduler, prepared.optimizers, prepared.step_with_optimizer, split_batches=True)
        self.times = times

    def step(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(self.times):
            super().step(*args, **kwargs)
