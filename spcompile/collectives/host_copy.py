"""Copies of a value to the memory of the host and back, written as collectives are: a start, and a wait.

`to_host` and `to_device` start a copy, whose result nobody may read before its `wait_copy`. The wait also names what is
copied: it is alive until then. On CUDA each direction has a stream of its own, and what goes to the host lies in pinned
memory, of which torch keeps a pool. Torch has ops of this kind too (2.13: `torch.ops.ao`), which free what they copied
by force; a backward could then not run twice. On CPUs both are copies that are done at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spcompile.collectives.collective import _LIBRARY


@dataclass(frozen=True)
class HostCopy:
    """All that is known about one direction.

    summary, drawing: as of a `Collective`. spec(x): the result of one rank. dual: the direction in which its gradient
    goes, and what is saved comes back.
    """

    op: torch._ops.OpOverload
    summary: str
    drawing: str
    spec: Callable[..., Tensor]
    dual: str

    @property
    def name(self) -> str:
        return self.op._schema.name.split("::")[1]


class _Arrival(NamedTuple):
    """A copy on its way, on a device; event: when it is there."""

    device: torch.device
    event: Any


_streams: dict[tuple[torch.device, str], Any] = {}
_on_their_way: dict[int, _Arrival] = {}  # by the address of what is written


def _to_host(x: Tensor) -> Tensor:
    pins = x.device.type == "cuda"
    host = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu", pin_memory=pins)
    return _copied(host, x, x.device, "to_host")


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    back = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    return _copied(back, x, back.device, "to_device")


def _copied(target: Tensor, source: Tensor, device: torch.device, direction: str) -> Tensor:
    if device.type != "cuda":
        return target.copy_(source)
    stream = _streams.get((device, direction))
    if stream is None:
        stream = _streams[device, direction] = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which made the source, and may have used the target before
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        _on_their_way[target.data_ptr()] = _Arrival(device, stream.record_event())
    return target


def _wait_copy(x: Tensor, source: Tensor) -> Tensor:
    arrival = _on_their_way.pop(x.data_ptr(), None)
    if arrival is not None:
        torch.cuda.current_stream(arrival.device).wait_event(arrival.event)
    return x


def _fake_to_host(x: Tensor) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu")


def _fake_to_device(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)


def _fake_wait_copy(x: Tensor, source: Tensor) -> Tensor:
    return x


def _define_host_op(schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> torch._ops.OpOverload:
    """An op of the namespace spx, for tensors on any device."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spx::{name}", fake, lib=_LIBRARY)
    found: torch._ops.OpOverload = getattr(torch.ops.spx, name).default
    return found


WAIT_COPY = _define_host_op("wait_copy(Tensor(a) x, Tensor source) -> Tensor(a)", _wait_copy, _fake_wait_copy)
TO_HOST = HostCopy(
    _define_host_op("to_host(Tensor x) -> Tensor", _to_host, _fake_to_host),
    "Starts to copy a value to the memory of the host.",
    """\
rank 0   [a b]   device        [a b]   host
rank 1   [c d]   device   ->   [c d]   host""",
    lambda x: x.clone(),
    "to_device",
)
TO_DEVICE = HostCopy(
    _define_host_op("to_device(Tensor x, Device device) -> Tensor", _to_device, _fake_to_device),
    "Starts to bring a value back from the memory of the host.",
    """\
rank 0   [a b]   host        [a b]   device
rank 1   [c d]   host   ->   [c d]   device""",
    lambda x, device: x.to(device, copy=True),
    "to_host",
)
HOST_COPIES = {copy.op: copy for copy in (TO_HOST, TO_DEVICE)}
