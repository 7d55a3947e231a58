"""Checksums of tensors by integer arithmetic over their bits, on the tensor's device: equal bits, equal number.

Sums of int64 wrap, so they do not depend on the order in which a device adds: a checksum is the same on every machine,
for any number of threads. It depends on places, too: the same rows in another order have another checksum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_WORD = 8  # bytes
_COLUMNS = 1024
_FACTOR = -7046029254386353131  # 2^64 / golden ratio, as int64
_OTHER_FACTOR = -4658895280553007687


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A number of type int64 on the tensor's device. Makes no copy of a contiguous tensor's size.

    The bits are a matrix of words; the sums of its columns and those of its rows are weighted by place and summed.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    data = (torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat).view(torch.uint8)
    rows = data.numel() // (_WORD * _COLUMNS)
    cut = rows * _WORD * _COLUMNS
    if data.storage_offset() % _WORD:
        data = data.clone()
    parts = []
    if rows:
        words = data[:cut].view(torch.int64).view(rows, _COLUMNS)
        parts += [_weighted(words.sum(0), _FACTOR), _weighted(words.sum(1), _OTHER_FACTOR)]
    if cut < data.numel() or not rows:
        parts.append(_weighted(data[cut:].to(torch.int64), _OTHER_FACTOR))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _weighted(values: Tensor, factor: int) -> Tensor:
    """The sum of values, each times an odd number that its place gives."""
    places = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.int64)
    weights = places.mul_(factor).bitwise_or_(1)
    return (values * weights).sum()


def part_on_this_rank(tensor: Tensor) -> Tensor:
    """What of a tensor this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def can_be_summed(value: object) -> bool:
    """Whether a value is a tensor whose bits are its meaning: dense, and real."""
    if not isinstance(value, Tensor):
        return False
    part = part_on_this_rank(value)
    return part.layout == torch.strided and not part.is_meta and not part.is_quantized and not part.is_nested


def checksums(tensors: Sequence[Tensor]) -> Callable[[], list[int]]:
    """Start the checksums of tensors; what is returned waits for them. On accelerators nothing waits before that."""
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(part_on_this_rank(tensor).device, []).append(place)
    started = [
        (places, _started(torch.stack([checksum(part_on_this_rank(tensors[i])) for i in places])))
        for places in by_device.values()
    ]

    def found() -> list[int]:
        result = [0] * len(tensors)
        for places, numbers in started:
            for place, number in zip(places, numbers(), strict=True):
                result[place] = number
        return result

    return found


def _started(numbers: Tensor) -> Callable[[], list[int]]:
    """The numbers, once they are on the host: copied behind what the device has been given, and waited for by event."""
    if numbers.device.type == "cpu":
        values = numbers.tolist()
        return lambda: values
    device = torch.get_device_module(numbers.device)
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = device.Event(blocking=True)
    copied.record()

    def arrived() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return arrived
