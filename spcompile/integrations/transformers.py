"""The Trainer of transformers over a mesh: `SequenceParallelTrainer(model, args, ..., mesh={"cp": 2})`.

Of any other Trainer: `class MyTrainer(SequenceParallelMixin, SFTTrainer): pass`. The ranks of one `tp` x `cp` group
train as one process does, and `dp` such groups as one process with `dp` times the batch. The mixin replaces the
Trainer's Accelerator and tells it how many ranks share a batch. Read from transformers 5.23.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from spcompile.diagnostics import IllegalOption
from spcompile.full_state_dict import full_state_dict
from spcompile.integrations.accelerate import SequenceParallelAccelerator
from spcompile.integrations.batch_mesh import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

IGNORED = -100  # the label of what no loss counts

# Type checkers see a Trainer; what stands behind the mixin is chosen by whoever uses it.
_Base: Any = Trainer if TYPE_CHECKING else object


class SequenceParallelMixin(_Base):
    """Before a Trainer's class in the list of bases.

    mesh: sizes of the axes `dp`, `tp`, `cp`, the first one outermost, or a DeviceMesh; default: `cp` over all ranks.
    spcompile_options: options of the backend, but `mesh`.
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
        **kwargs: Any,
    ) -> None:
        self._mesh_and_options: dict[str, Any] = {"mesh": mesh, "spcompile_options": spcompile_options}
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

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; ranks that share batches draw the same random numbers for them.

        Raises:
            IllegalOption: checkpoints with an optimizer of sharded parameters, which the Trainer cannot write or read.
        """
        if is_sharded(self.model):
            if resume_from_checkpoint or self.args.load_best_model_at_end:
                asked = "resume_from_checkpoint" if resume_from_checkpoint else "load_best_model_at_end"
                raise IllegalOption(f"{asked} with sharded parameters", legal="parallelize(..., checkpoint=folder)")
            if self.args.save_strategy != "no" and not self.args.save_only_model:
                legal = "save_only_model=True, or save_strategy='no' and torch.distributed.checkpoint"
                raise IllegalOption("save_only_model=False with sharded parameters", legal=legal)
        self.accelerator.batches.share_random_states(self.accelerator.device)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_sharded(model):  # parallelize has put it there, and torch moves no DTensor that has had a gradient
            super()._move_model_to_device(model, device)

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

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. Over `dp` its loss is that of all batches, in which nothing counts that was repeated."""
        if self.accelerator.num_batches == 1:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._nothing_twice(inputs)
        labels = inputs.get("labels")  # the step may take it out
        loss, logits, predicted = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            weight = self._weight_of_loss(labels)
            losses, weights = map(self.accelerator.batches.gather, (loss, weight.to(loss)))
            loss = torch.where(weights > 0, losses * weights, 0).sum() / weights.sum()
        return loss, logits, predicted

    def compute_loss(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """The Trainer's."""
        self._divided_by_all = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return super().compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    def _nothing_twice(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The last batches are filled with entries from the start of the dataset: no loss counts their labels."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        changed = dict(inputs)
        for name in self.label_names:
            labels = inputs.get(name)
            if isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point():
                own = max(0, state.remainder - self.accelerator.batch_index * labels.shape[0])
                changed[name] = labels.clone()
                changed[name][own:] = IGNORED
        return changed

    def _weight_of_loss(self, labels: Any) -> Tensor:
        """What the loss of this batch counts among those of all: as many labels as it is a mean of.

        A loss that was divided by the labels of all batches was multiplied by the number of batches: all count alike.
        """
        passed_on = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if (self._divided_by_all and passed_on) or not isinstance(labels, Tensor) or labels.is_floating_point():
            return torch.ones(())
        return (labels[..., 1:] if self._loss_shifts_labels else labels).ne(IGNORED).sum()

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
) -> Trainer:
    """A Trainer that something else has made becomes one over a mesh, in place. Called before it trains, by all ranks.

    Arguments and errors: as SequenceParallelMixin.
    """
    kind, made = type(trainer), cast(Any, trainer)
    made.__class__ = type(f"SequenceParallel{kind.__name__}", (SequenceParallelMixin, kind), {})
    made._mesh_and_options = {"mesh": mesh, "spcompile_options": spcompile_options}
    made.create_accelerator_and_postprocess()
    return trainer
