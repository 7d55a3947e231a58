"""Bool buffers of a model: masks whose values may be read when it is compiled, and are watched afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.diagnostics import ChangedBuffer
from spcompile.torch_private import unset_fake_temporarily

KEY = "module_buffer"  # in a placeholder's meta, shared by all copies of the graph


@dataclass(frozen=True)
class Band:
    """A matrix that is True where -behind <= k - q <= ahead; None for no bound."""

    ahead: int | None
    behind: int | None


@dataclass
class ModuleBuffer:
    """A buffer behind a placeholder, and what was read of it, on which the graph relies from then on."""

    value: Tensor
    is_read: bool = False
    band: Band | None = None

    def read(self) -> Band | None:
        """The band that its matrices hold."""
        if not self.is_read:
            with unset_fake_temporarily():
                self.is_read, self.band = True, band_of(self.value)
        return self.band


@torch.no_grad()
def band_of(buffer: Tensor) -> Band | None:
    """The band that every matrix of a bool tensor [.., M, M'] holds; None where they hold something else."""
    if buffer.dtype != torch.bool or buffer.ndim < 2 or buffer.numel() == 0 or buffer.is_meta:
        return None
    rows, columns = buffer.shape[-2:]
    first, last = (buffer.reshape(-1, rows, columns)[0, at].nonzero().flatten().tolist() for at in (0, -1))
    if not first or not last:
        return None
    ahead = None if first[-1] == columns - 1 else int(first[-1])
    behind = None if last[0] == 0 else rows - 1 - int(last[0])
    distance = torch.arange(columns, device=buffer.device) - torch.arange(rows, device=buffer.device)[:, None]
    expected = torch.ones_like(distance, dtype=torch.bool)
    if ahead is not None:
        expected &= distance <= ahead
    if behind is not None:
        expected &= distance >= -behind
    return Band(ahead, behind) if bool((buffer == expected).all()) else None


class Relied(NamedTuple):
    """A buffer whose values a program relies on: its place among the inputs, its name, what was read of it."""

    place: int
    name: str
    band: Band


def relied_on(graph: fx.Graph) -> list[Relied]:
    """The buffers that were read when a captured graph was compiled."""
    buffers = [(node.meta.get(KEY), str(node.target)) for node in graph.nodes if node.op == "placeholder"]
    return [
        Relied(i, name, buffer.band)
        for i, (buffer, name) in enumerate(buffers)
        if buffer is not None and buffer.band is not None
    ]


def watched(run: Callable[..., Any], relied: Sequence[Relied], inputs: Sequence[Any]) -> Callable[..., Any]:
    """`run`, which first makes sure that the buffers that were read still hold what they did.

    inputs: those of the compile, which held it.

    Raises:
        ChangedBuffer: one does not.
    """
    if not relied:
        return run
    seen = [(r, weakref.ref(inputs[r.place]), inputs[r.place]._version) for r in relied]

    def call(*args: Any) -> Any:
        for (i, name, band), buffer, version in seen:
            unchanged = args[i] is buffer() and args[i]._version == version
            if not unchanged and band_of(args[i]) != band:
                raise ChangedBuffer(f"{name} is another mask than when the model was compiled")
        return run(*args)

    return call
