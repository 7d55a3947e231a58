"""Batches as training tools pass them: looked at without being taken, and cut to some of their entries."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import find_batch_size, recursively_apply, send_to_device
from torch import Tensor

from spcompile.diagnostics import IllegalOption
from spcompile.integrations.batch_mesh import random_states, set_random_states


def first_batch(loader: Any, device: torch.device) -> Any:
    """The first batch of a data loader that accelerate has prepared; it comes again, and nothing random is drawn.

    Raises:
        IllegalOption: of a dataset without a length, which might not yield it again.
    """
    if not hasattr(loader.dataset, "__len__"):
        raise IllegalOption(
            "shard_parameters= with a dataset without a length", legal="a model that parallelize has sharded"
        )
    states = random_states(device)
    try:
        return send_to_device(next(iter(loader.base_dataloader)), device)
    finally:
        set_random_states(states, device)


def first_entries(values: Any, entries: int) -> Any:
    """The first entries of all tensors that have one for each entry of the batch; the others as they are."""
    size = find_batch_size(values)

    def first(value: Tensor) -> Tensor:
        return value[:entries] if value.ndim and value.shape[0] == size else value

    return recursively_apply(first, values)
