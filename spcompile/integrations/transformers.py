"""The Trainer of transformers over a mesh: `SequenceParallelTrainer(model, args, ..., mesh={"cp": 2})`.

Of any other Trainer: `class MyTrainer(SequenceParallelMixin, SFTTrainer): pass`. The ranks of one `tp` x `cp` group
train as one process does, and `dp` such groups as one process with `dp` times the batch. The mixin replaces the
Trainer's Accelerator and tells it how many ranks share a batch. Read from transformers 5.23.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import seed_worker

from spcompile.diagnostics import IllegalOption
from spcompile.full_state_dict import full_state_dict
from spcompile.integrations.accelerate import SequenceParallelAccelerator
from spcompile.integrations.batch_mesh import is_sharded
from spcompile.integrations.batches import first_batch, first_entries
from spcompile.integrations.sharded_checkpoints import own_state, read_weights, whole_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)
IGNORED = -100  # the label of what no loss counts

# Type checkers see a Trainer; what stands behind the mixin is chosen by whoever uses it.
_Base: Any = Trainer if TYPE_CHECKING else object


class SequenceParallelMixin(_Base):
    """Before a Trainer's class in the list of bases.

    mesh: sizes of the axes `dp`, `tp`, `cp`, the first one outermost, or a DeviceMesh; default: `cp` over all ranks.
    spcompile_options: options of the backend, but `mesh`.
    shard_parameters: what `parallelize` has under this name: axes over which parameters, their gradients and states of
        the optimizer are split, or () for those that `tp` splits as the program reads them. None: all ranks hold all.
        The model is sharded when training starts, with the first batch as its example.
    The other arguments are the Trainer's. A batch size "per device" is that of one `tp` x `cp` group.

    Raises:
        IllegalMesh, IllegalOption: as SequenceParallelAccelerator does.
    """

    accelerator: SequenceParallelAccelerator

    def __init__(
        self,
        *args: Any,
        mesh: DeviceMesh | Mapping[str, int] | None = None,
        spcompile_options: Mapping[str, Any] | None = None,
        shard_parameters: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._mesh_and_options: dict[str, Any] = {"mesh": mesh, "spcompile_options": spcompile_options}
        self._shard_parameters = shard_parameters
        super().__init__(*args, **kwargs)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self._accelerator_args = dict(super()._build_accelerator_args(**kwargs))
        return self._accelerator_args

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, then one over the mesh with the same arguments."""
        super().create_accelerator_and_postprocess()
        self.accelerator = SequenceParallelAccelerator(**self._accelerator_args, **self._mesh_and_options)
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def get_tp_size(self) -> int:
        """How many ranks share a batch: by that the Trainer divides counts of tokens, and the number of its batches."""
        return self.accelerator.ranks_per_batch

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; ranks that share batches draw the same random numbers for them."""
        self.accelerator.batches.share_random_states(self.accelerator.device)
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        if self._shard_parameters is not None and self.accelerator.mesh is not None and not is_sharded(self.model):
            if self.optimizer is not None:
                raise IllegalOption(
                    "an optimizer of a model that is still to be sharded", legal="optimizer_cls_and_kwargs="
                )
            inputs = self._prepare_inputs(first_batch(train_dataloader, self.accelerator.device))
            self.accelerator.shard(self.model, inputs, self._shard_parameters)
        return super()._prepare_for_training(max_steps, train_dataloader, *args, **kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # parallelize has put it there, and torch moves no DTensor that has had a gradient
            super()._move_model_to_device(model, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if is_sharded(model):
            read_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if is_sharded(self.model):
            read_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = self.optimizer.optimizer
        whole = whole_state(optimizer)  # all ranks help: the Trainer lets one save
        hook = optimizer.register_state_dict_post_hook(lambda of, state: whole)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            hook.remove()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        if all(file.is_file() for file in files):  # as the Trainer does, but what other ranks keep stays in the file
            whole, schedule = (torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files)
            self.optimizer.load_state_dict(own_state(whole, self.optimizer.optimizer))
            self.lr_scheduler.load_state_dict(schedule)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is None and is_sharded(self.model):
            state_dict = full_state_dict(self.model)  # all ranks help: the Trainer lets one save
        super()._save(output_dir, state_dict)

    def get_train_dataloader(self) -> Any:
        """The Trainer's; workers of ranks that share batches draw the same random numbers.

        Raises:
            IllegalOption: a sampler that splits entries over all processes.
        """
        if self.args.train_sampling_strategy == "batch_rebalance" and self.accelerator.ranks_per_batch > 1:
            legal = "'random', 'sequential', 'group_by_length'"
            raise IllegalOption("train_sampling_strategy='batch_rebalance' with tp or cp", legal=legal)
        loader = super().get_train_dataloader()
        if loader.worker_init_fn is not None:
            workers = self.args.dataloader_num_workers
            loader.worker_init_fn = functools.partial(
                seed_worker, num_workers=workers, rank=self.accelerator.batch_index
            )
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; ranks that share batches draw the same random numbers, as where tokens are sampled."""
        self.accelerator.batches.share_random_states(self.accelerator.device)
        if self.gather_function == self.accelerator.gather:  # Seq2SeqTrainer's, which would have each batch many times
            self.gather_function = functools.partial(self.accelerator.gather_batches)
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. Over `dp` its loss is that of all batches, and what fills up the last ones counts nowhere."""
        if self.accelerator.num_batches == 1:
            return super().prediction_step(model, inputs, *args, **kwargs)
        own, entries = self._own_entries(inputs), find_batch_size(inputs)
        given = inputs
        if own == 0:  # its loss counts nothing, and what comes of it is cut off
            given = inputs | {name: torch.full_like(inputs[name], IGNORED) for name in self._labels_of(inputs)}
        elif own < entries:
            inputs.update(first_entries(inputs, own))  # in place: metrics see these inputs
        weight = self._weight_of_loss(given, own)  # before the step, which may take labels out
        with self._as_the_only_batch():
            loss, *found = super().prediction_step(model, given, *args, **kwargs)
        if loss is not None:
            loss = torch.where(weight > 0, loss, 0) if own == 0 else loss
            losses, weights = map(self.accelerator.batches.gather, (loss, weight.to(loss)))
            loss = torch.where(weights > 0, losses * weights, 0).sum() / weights.sum()
        if own == 0:
            inputs.update(first_entries(inputs, 0))
            found = [None if value is None else first_entries(value, 0) for value in found]
        return loss, *found

    def _own_entries(self, inputs: Mapping[str, Any]) -> int:
        """How many entries of a batch are not repeated: the last ones are filled from the start of the dataset."""
        state, entries = self.accelerator.gradient_state, int(find_batch_size(inputs))
        if not state.end_of_dataloader or state.remainder == 0:
            return entries
        if state.remainder < 0 or entries * self.accelerator.num_batches != state.active_dataloader.total_batch_size:
            log.warning(
                "nothing says how many entries the dataset has: those that fill the last batches of dp count twice"
            )
            return entries
        return min(entries, max(0, state.remainder - self.accelerator.batch_index * entries))

    def _labels_of(self, inputs: Mapping[str, Any]) -> list[str]:
        return [name for name in self.label_names if isinstance(inputs.get(name), Tensor)]

    def _weight_of_loss(self, inputs: Mapping[str, Any], own: int) -> Tensor:
        """How many labels, or entries, the loss of this batch is a mean of."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if own == 0 or not isinstance(labels, Tensor) or labels.is_floating_point():
            return torch.tensor(float(own))
        shifts = self._loss_shifts_labels and "shift_labels" not in inputs
        return (labels[..., 1:] if shifts else labels).ne(IGNORED).sum()

    @contextlib.contextmanager
    def _as_the_only_batch(self) -> Iterator[None]:
        """Losses are means over the batch of this rank, whether or not a model divides by the number it is told."""
        kept = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = kept

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        count = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(count, Tensor) and not self.args.average_tokens_across_devices:
            count = count * self.accelerator.ranks_per_batch  # nothing was added up that the Trainer divides
        return count

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.accelerator.ranks_per_batch

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        # A checkpoint of another mesh has them for some ranks only.
        self.accelerator.batches.share_random_states(self.accelerator.device)


class SequenceParallelTrainer(SequenceParallelMixin, Trainer):
    """The Trainer of transformers over a mesh; see SequenceParallelMixin."""


def over_mesh(
    trainer: Trainer,
    *,
    mesh: DeviceMesh | Mapping[str, int] | None = None,
    spcompile_options: Mapping[str, Any] | None = None,
    shard_parameters: str | Sequence[str] | None = None,
) -> Trainer:
    """A Trainer that something else has made becomes one over a mesh, in place. Called before it trains, by all ranks.

    Arguments and errors: as SequenceParallelMixin.
    """
    kind, made = type(trainer), cast(Any, trainer)
    made.__class__ = type(f"SequenceParallel{kind.__name__}", (SequenceParallelMixin, kind), {})
    made._mesh_and_options = {"mesh": mesh, "spcompile_options": spcompile_options}
    made._shard_parameters = shard_parameters
    made.create_accelerator_and_postprocess()
    return trainer
