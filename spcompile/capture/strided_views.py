"""Views by strides, `as_strided`: written as indices into the elements, which hold whatever strides a value has later.

The strides that a model asks for are those of its own value in memory. A pass may change how that value lies there, and
then the same strides would read other elements, or memory that is no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.diagnostics import CaptureFailed, source_of
from spcompile.graph.typed_call import named_arguments


def indexed_view(node: fx.Node) -> tuple[Callable[..., Tensor], list[Any]]:
    """What gives the elements of an `as_strided`, and what it reads.

    Raises:
        CaptureFailed: sizes that are not known, or elements of memory beyond the operand's own.
    """
    args = named_arguments(node.target, node.args, node.kwargs)
    order, places = _elements(node, args)
    return lambda x: x.permute(order).flatten()[places(x.device)], [args["self"]]


def indexed_write(node: fx.Node) -> tuple[Callable[..., Tensor], list[Any]]:
    """What writes to the elements of an `as_strided`, and what it reads. torch's own has another gradient (2.13).

    Raises:
        CaptureFailed: as `indexed_view`, and where an element is written to twice.
    """
    args = named_arguments(node.target, node.args, node.kwargs)
    order, places = _elements(node, args)
    if len(places("cpu").unique()) < math.prod(args["size"]):
        raise CaptureFailed("as_strided writes to an element twice", where=source_of(node))

    def form(x: Tensor, new: Tensor) -> Tensor:
        lying = x.permute(order)
        written = lying.flatten().index_put([places(x.device).flatten()], new.flatten())
        return written.reshape(lying.shape).permute([order.index(dim) for dim in range(x.ndim)])

    return form, [args["self"], args["src"]]


def _elements(node: fx.Node, args: Mapping[str, Any]) -> tuple[list[int], Callable[[Any], Tensor]]:
    """(the operand's dims as they lie in memory, a function that makes the places of elements on a device)."""
    x, sizes, strides = args["self"], args["size"], args["stride"]
    val: Tensor = x.meta["val"]
    start = 0 if args.get("storage_offset") is None else args["storage_offset"] - val.storage_offset()
    numbers = [*val.shape, *val.stride(), *sizes, *strides, start]
    if not all(isinstance(number, int) for number in numbers):
        raise CaptureFailed("as_strided of a size that is not known when compiling", where=source_of(node))
    apart = val.stride()
    order = sorted(range(val.ndim), key=lambda dim: (-apart[dim], dim))
    last = start + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    is_inside = math.prod(sizes) == 0 or (start >= 0 and last < val.numel())
    if not is_inside or not val.permute(order).is_contiguous():
        raise CaptureFailed("as_strided reads memory beside its operand", where=source_of(node))
    return order, partial(_places_of, sizes, strides, start)


def _places_of(sizes: Sequence[int], strides: Sequence[int], start: int, device: Any) -> Tensor:
    places = torch.full([], start, device=device)
    for size, stride in zip(sizes, strides, strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device=device)
    return places
