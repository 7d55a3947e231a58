"""One element of a graph node as a symbolic value.

Reading goes from the node towards the inputs. Where an op has no symbolic form, a bool or integer tensor becomes a
leaf: Element(name, indices). A floating point tensor has no leaf; the first bool or integer node above it becomes one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx as fx
from sympy.core.symbol import Str

from spcompile.capture.module_buffer import KEY, Band
from spcompile.graph.edit import is_tensor
from spcompile.recognition.masks.index_maps import IndexSpace, Indices, size_expr, sizes_of, step
from spcompile.recognition.masks.values import (
    Element,
    Scaled,
    Unreadable,
    Value,
    at_least_zero,
    either,
    lift,
    size,
    to_condition,
    to_float,
    to_number,
)

aten = torch.ops.aten
LARGEST = 64  # parts of a value that is read on; choices between choices grow exponentially

Read = Callable[["Reader", fx.Node, Indices], Value]
_READERS: dict[Any, Read] = {}


class Reader:
    """Reads elements of one graph's nodes; the answers are remembered.

    leaves: the nodes behind the Element look-ups by name.
    stopped_at: for each leaf, the call that could not be read.
    """

    def __init__(self, space: IndexSpace) -> None:
        self.space = space
        self.leaves: dict[str, fx.Node] = {}
        self.stopped_at: dict[str, fx.Node] = {}
        self._memo: dict[tuple[fx.Node, Indices], Value | Unreadable] = {}
        self._fresh = 0

    def element(self, node: fx.Node, indices: Indices) -> Value:
        """The element of `node` at `indices`.

        Raises:
            Unreadable: a floating point value without symbolic form.
        """
        key = (node, indices)
        if key not in self._memo:
            try:
                self._memo[key] = self._read(node, indices)
            except Unreadable as stop:
                self._memo[key] = Unreadable(stop.node or node)
        value = self._memo[key]
        if isinstance(value, Unreadable):
            return self._leaf(node, indices, value.node or node)
        return value

    def fresh_index(self) -> sympy.Symbol:
        """An index symbol that is used nowhere else."""
        self._fresh += 1
        return sympy.Symbol(f"t{self._fresh}", integer=True, nonnegative=True)

    def operand(self, arg: Any, indices: Indices) -> Value:
        """An operand of an elementwise call whose result is read at `indices`."""
        if is_tensor(arg):
            return self.element(arg, _broadcast(arg, indices))
        if isinstance(arg, bool):
            return sympy.true if arg else sympy.false
        return arg if isinstance(arg, float) else size_expr(arg)

    def two_elements(self, node: fx.Node, indices: Indices) -> tuple[Value, Value] | None:
        """The operands of a comparison, where they are two elements of one tensor of integers; they are not opened.

        f[q] == f[k] says that two positions are of one document, whatever f is. Opened, a choice in f hides that.
        """
        places = [self._source(arg, _broadcast(arg, indices)) for arg in node.args[:2] if is_tensor(arg)]  # type: ignore[arg-type]
        if len(places) != 2 or places[0][0] is not places[1][0] or places[0] == places[1]:
            return None
        source = places[0][0]
        dtype = source.meta["val"].dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            return None
        return tuple(self._leaf(source, at, source) for _, at in places)

    def _source(self, node: fx.Node, indices: Indices) -> tuple[fx.Node, Indices]:
        """The tensor whose elements this one only moves."""
        while (moved := step(node, indices, self.space)) is not None:
            node, indices = moved
        return node, indices

    def _read(self, node: fx.Node, indices: Indices) -> Value:
        moved = step(node, indices, self.space)
        if moved is not None:
            return self.element(*moved)
        if KEY in node.meta and (band := node.meta[KEY].band()) is not None:
            return _of_band(band, indices)
        read = _READERS.get(node.target) if node.op == "call_function" else None
        if read is None:
            return _constant_attribute(node) if node.op == "get_attr" else stop(node)
        value = as_dtype(read(self, node, indices), node.meta["val"].dtype)
        return value if size(value) <= LARGEST else stop(node)

    def _leaf(self, node: fx.Node, indices: Indices, stopped_at: fx.Node) -> Value:
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point or dtype.is_complex:
            raise Unreadable(stopped_at)
        self.leaves[node.name] = node
        self.stopped_at.setdefault(node.name, stopped_at)
        element = Element(Str(node.name), *indices)
        return sympy.Ne(element, 0) if dtype == torch.bool else element


def stop(node: fx.Node) -> Value:
    """Say that this call has no symbolic form."""
    raise Unreadable(node)


def _broadcast(node: fx.Node, indices: Indices) -> Indices:
    sizes = sizes_of(node)
    kept = indices[len(indices) - len(sizes) :]
    return tuple(sympy.Integer(0) if size == 1 else i for size, i in zip(sizes, kept, strict=True))


def _of_band(band: Band, indices: Indices) -> Value:
    """An element of a buffer."""
    q, k = indices[-2:]
    bounds = [at_least_zero(q - k + band.ahead)] if band.ahead is not None else []
    bounds += [at_least_zero(k - q + band.behind)] if band.behind is not None else []
    return either(sympy.And(*bounds), _constant(band.inside), _constant(band.outside))


def _constant_attribute(node: fx.Node) -> Value:
    module: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        module = getattr(module, name)
    is_fake = isinstance(module, torch._subclasses.FakeTensor)
    if not isinstance(module, torch.Tensor) or is_fake or module.numel() != 1 or isinstance(module, torch.nn.Parameter):
        raise Unreadable(node)
    return _constant(module.item())


def _constant(number: Any) -> Value:
    if isinstance(number, bool):
        return sympy.true if number else sympy.false
    return number if isinstance(number, float) else size_expr(number)


def as_dtype(value: Value, dtype: torch.dtype) -> Value:
    """The value converted as a tensor of this dtype would hold it.

    Raises:
        Unreadable: rounding or wrap-around cannot be followed.
    """
    if dtype == torch.bool:
        return to_condition(value)
    if dtype.is_floating_point:
        return lift(lambda x: _rounded_value(x, dtype), to_float(value))
    return lift(lambda x: _as_integer(x, dtype), to_number(value))


def _rounded_value(value: Value, dtype: torch.dtype) -> Value:
    if not isinstance(value, Scaled):
        return torch.tensor(value, dtype=dtype).item()
    factor = torch.tensor(value.factor, dtype=dtype).item()
    if not math.isfinite(factor) or factor == 0:
        raise Unreadable
    return Scaled(factor, value.number)


def _as_integer(value: Value, dtype: torch.dtype) -> Value:
    if isinstance(value, Scaled):
        if value.factor != 1:
            raise Unreadable
        value = value.number
    if isinstance(value, float):
        if not value.is_integer():
            raise Unreadable
        value = sympy.Integer(int(value))
    wide = dtype in (torch.int32, torch.int64)
    if not wide and value not in (0, 1):  # arithmetic in narrow integers wraps around
        raise Unreadable
    return value


def reads(*names: str) -> Callable[[Read], Read]:
    """Declare how the result of some aten calls is read; `name.overload`, or every overload of `name`."""

    def add(function: Read) -> Read:
        for name in names:
            packet_name, _, overload = name.partition(".")
            packet = getattr(aten, packet_name, None)
            overloads = [overload] if overload else packet.overloads() if packet is not None else []
            for each in overloads:
                op = getattr(packet, each, None)
                if op is not None and not op._schema.is_mutable:
                    _READERS[op] = function
        return function

    return add
