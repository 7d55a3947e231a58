"""How many bytes autograd keeps between forward and backward: the memory that sequence parallelism divides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn


def saved_activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that `forward` saves for backward, parameters and buffers not counted.

    Works for eager and for compiled models: what a compiled graph saves is saved by one autograd function. A view
    counts with its whole storage, since that is what stays alive. `forward` returns the loss; its graph is dropped.
    """
    return saved_bytes_beside([*model.parameters(), *model.buffers()], forward)


def saved_bytes_beside(own: Iterable[Tensor], forward: Callable[[], Tensor]) -> int:
    """`saved_activation_bytes` of any function; own: tensors that are not counted."""
    held = {storage.data_ptr() for tensor in own for storage in _storages(tensor)}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps an address from being used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.update((storage.data_ptr(), storage) for storage in _storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in held)
    del loss
    return total


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # a wrapper such as DTensor has no storage of its own
        inner = (getattr(tensor, name) for name in flatten()[0])
        for part in inner:
            if isinstance(part, Tensor):
                yield from _storages(part)
    else:
        yield tensor.untyped_storage()
