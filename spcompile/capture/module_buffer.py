"""Buffers of a model that are masks: their values may be read when it is compiled, and are watched afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.diagnostics import ChangedBuffer
from spcompile.torch_private import unset_fake_temporarily

KEY = "module_buffer"  # in a placeholder's meta, shared by all copies of the graph
_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}
AT_A_TIME = 1 << 22  # elements of a matrix that are compared at a time


@dataclass(frozen=True)
class Band:
    """A matrix that is `inside` where -behind <= k - q <= ahead, None for no bound, and `outside` elsewhere."""

    ahead: int | None
    behind: int | None
    inside: bool | float = True
    outside: bool | float = False


class Contents(NamedTuple):
    """What a buffer holds. is_small: floating-point numbers, none of which would exclude a key."""

    band: Band | None
    is_small: bool


@dataclass
class ModuleBuffer:
    """A buffer behind a placeholder, and what was read of it. relied_on: whether the graph relies on that now.

    It is not kept alive: graphs outlive the model that they were captured from.
    """

    value: weakref.ref[Tensor]
    contents: Contents | None = None
    relied_on: bool = False

    def band(self) -> Band | None:
        """The band that its matrices hold."""
        found = self._read().band
        self.relied_on |= found is not None
        return found

    def is_small(self) -> bool:
        """Whether none of its numbers excludes a key."""
        found = self._read().is_small
        self.relied_on |= found
        return found

    def _read(self) -> Contents:
        if self.contents is None:
            buffer = self.value()
            assert buffer is not None, "the compile that reads it has ended"
            with unset_fake_temporarily():
                self.contents = contents_of(buffer)
        return self.contents


def may_be_read(value: Any) -> bool:
    """Whether this state of a model may be a mask: a tensor of matrices that is no parameter."""
    if type(value) is not Tensor or value.requires_grad or value.is_meta or value.layout != torch.strided:
        return False
    return value.ndim >= 2 and value.numel() > 0 and value.dtype in _DTYPES


@torch.no_grad()
def contents_of(buffer: Tensor) -> Contents:
    """What a buffer holds; nothing that is known if it may not be read."""
    if not may_be_read(buffer):
        return Contents(None, is_small=False)
    return Contents(band_of(buffer), buffer.dtype.is_floating_point and bool((buffer > EXCLUDES).all()))


@torch.no_grad()
def band_of(buffer: Tensor) -> Band | None:
    """The band that every matrix of a tensor [.., M, M'] holds; None where they hold something else.

    Bools may be True everywhere. Two numbers make a mask, as torch.tril(torch.ones(M, M)) or 0 and -inf; one does not.
    """
    if not may_be_read(buffer):
        return None
    first, last = (buffer[(0,) * (buffer.ndim - 2)][row].tolist() for row in (0, -1))
    values = sorted({*first, *last}, reverse=True)
    if values == [True] and buffer.dtype == torch.bool:
        values.append(False)
    if len(values) != 2:
        return None
    for inside, outside in (values, values[::-1]):
        band = _band(first, last, buffer.shape[-2], inside, outside)
        if band is not None and _holds(buffer, band):
            return band
    return None


def _band(first: list[Any], last: list[Any], rows: int, inside: Any, outside: Any) -> Band | None:
    """The only band with this first and last row."""
    if inside not in first or inside not in last:
        return None
    ahead = len(first) - 1 - first[::-1].index(inside)
    behind = rows - 1 - last.index(inside)
    no_bound = ahead == len(first) - 1, behind == rows - 1
    return Band(None if no_bound[0] else ahead, None if no_bound[1] else behind, inside, outside)


def _holds(buffer: Tensor, band: Band) -> bool:
    """Whether every matrix is this band; some rows at a time, since none may be larger than it."""
    rows, columns = buffer.shape[-2:]
    k = torch.arange(columns, device=buffer.device, dtype=torch.int32)
    step = max(1, AT_A_TIME // columns)
    for start in range(0, rows, step):
        part = buffer[..., start : start + step, :]
        q = torch.arange(start, start + part.shape[-2], device=buffer.device, dtype=torch.int32)[:, None]
        is_inside = torch.ones(part.shape[-2:], dtype=torch.bool, device=buffer.device)
        if band.ahead is not None:
            is_inside &= k - q <= band.ahead
        if band.behind is not None:
            is_inside &= k - q >= -band.behind
        expected = torch.full(part.shape[-2:], band.outside, dtype=buffer.dtype, device=buffer.device)
        if not bool((part == expected.masked_fill_(is_inside, band.inside)).all()):
            return False
    return True


class Relied(NamedTuple):
    """A buffer whose values a program relies on: its place among the inputs, its name, what was read of it."""

    place: int
    name: str
    contents: Contents


def relied_on(graph: fx.Graph) -> list[Relied]:
    """The buffers that were read when a captured graph was compiled."""
    buffers = [(node.meta.get(KEY), str(node.target)) for node in graph.nodes if node.op == "placeholder"]
    return [
        Relied(i, name, buffer.contents)
        for i, (buffer, name) in enumerate(buffers)
        if buffer is not None and buffer.relied_on
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
        for (i, name, contents), buffer, version in seen:
            unchanged = args[i] is buffer() and args[i]._version == version
            if not unchanged and contents_of(args[i]) != contents:
                raise ChangedBuffer(f"{name} is another mask than when the model was compiled")
        return run(*args)

    return call
