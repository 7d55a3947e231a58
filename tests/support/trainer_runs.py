"""Short runs of the Trainer of transformers, alone and over a mesh, and what they leave behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import hf_models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

LENGTH = 24
IGNORED = -100
QUIET_ON_CPU: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of tokens of different lengths, a third of each without labels, and more than that in some."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        if not 0 <= at < self.count:
            raise IndexError(at)
        generator = torch.Generator().manual_seed(at)
        length = LENGTH - 5 * (at % 3)
        ids_S = torch.randint(1, hf_models.VOCAB, (length,), generator=generator)
        labels_S = ids_S.clone()
        labels_S[: length // (2 + at % 2)] = IGNORED
        return {"input_ids": ids_S, "labels": labels_S}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of LENGTH tokens a row."""
    made = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        missing = LENGTH - len(row["input_ids"])
        made["input_ids"].append(torch.nn.functional.pad(row["input_ids"], (0, missing)))
        made["labels"].append(torch.nn.functional.pad(row["labels"], (0, missing), value=IGNORED))
        made["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(row["input_ids"]), (0, missing)))
    return {name: torch.stack(values) for name, values in made.items()}


def labelled(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As padded, with a label for each token: the mean loss of two batches is that of both as one batch."""
    batch = padded(rows)
    return batch | {"labels": batch["input_ids"]}


@contextlib.contextmanager
def launched(ranks: int) -> Iterator[None]:
    """Inside, accelerate and transformers see one process, or as many ranks as a launcher has started."""
    from accelerate.state import AcceleratorState

    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    made = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    kept = {name: value for name, value in os.environ.items() if name not in made}
    AcceleratorState._reset_state(reset_partial_state=True)
    may_have_children = mock.patch.dict(multiprocessing.current_process()._config, daemon=False)
    with may_have_children, mock.patch.dict(os.environ, kept | (made if ranks > 1 else {}), clear=True):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def ddp_does_not_crash() -> Iterator[None]:
    """Torch 2.13: DDP over a group that was made at level DETAIL crashes, whatever the module."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        yield
    finally:
        dist.set_debug_level(level)


def shared_folder() -> str:
    """A new folder, the same on all ranks."""
    names = [tempfile.mkdtemp(prefix="spcompile-trainer-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    return names[0]


def arguments(folder: str, settings: Mapping[str, Any]) -> Any:
    """Five steps of two rows on CPU, each logged."""
    from transformers import TrainingArguments

    own = {"output_dir": folder, "max_steps": 5, "per_device_eval_batch_size": 2}
    return TrainingArguments(**(QUIET_ON_CPU | own | dict(settings)))


def left_behind(trainer: Any, result: Any = None) -> dict[str, Any]:
    """Losses and gradient norms of all steps, figures of the run, and the parameters."""
    history = trainer.state.log_history
    found: dict[str, Any] = {name: [row[name] for row in history if name in row] for name in ("loss", "grad_norm")}
    found["eval_loss"] = [row["eval_loss"] for row in history if "eval_loss" in row]
    found["learning_rate"] = [row["learning_rate"] for row in history if "learning_rate" in row]
    found["train_loss"] = [row["train_loss"] for row in history if "train_loss" in row]
    found["tokens seen"] = [float(trainer.state.num_input_tokens_seen)]
    found["epoch"] = [trainer.state.epoch]
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return found | {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in parameters.items()}


def worst(want: Mapping[str, Any], have: Mapping[str, Any]) -> dict[str, float]:
    """The largest difference in each entry, relative to the largest wanted value, or to 0.1 where that is more.

    A bias that no gradient reaches is rounding alone.
    """
    errors = {}
    for name, value in want.items():
        ours, theirs = (torch.as_tensor(x).double() for x in (value, have[name]))
        if ours.shape != theirs.shape:
            errors[name] = float("inf")
        elif ours.numel():
            errors[name] = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=0.1)).item()
    return errors
