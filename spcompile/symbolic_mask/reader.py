"""One element of a graph node as a symbolic value.

Reading goes from the node towards the inputs. Where an op has no symbolic form, a bool or integer tensor becomes a
leaf: Element(name, indices). A floating point tensor has no leaf; the first bool or integer node above it becomes one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from sympy.core.symbol import Str

from spcompile.graph import argument, is_tensor, shape_of
from spcompile.symbolic_mask.values import (
    Element,
    Unreadable,
    Value,
    at_least_zero,
    compare,
    is_bool,
    is_int,
    lift,
    negate,
    select,
    to_condition,
    to_float,
    to_number,
)
from spcompile.symbolic_mask.views import IndexSpace, Indices, from_end, size_expr, sizes_of, step

aten = torch.ops.aten
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

    def _read(self, node: fx.Node, indices: Indices) -> Value:
        moved = step(node, indices, self.space)
        if moved is not None:
            return self.element(*moved)
        read = _READERS.get(node.target) if node.op == "call_function" else None
        if read is None:
            return _constant_attribute(node) if node.op == "get_attr" else _stop(node)
        return _as_dtype(read(self, node, indices), node.meta["val"].dtype)

    def _leaf(self, node: fx.Node, indices: Indices, stopped_at: fx.Node) -> Value:
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point or dtype.is_complex:
            raise Unreadable(stopped_at)
        self.leaves[node.name] = node
        self.stopped_at.setdefault(node.name, stopped_at)
        element = Element(Str(node.name), *indices)
        return sympy.Ne(element, 0) if dtype == torch.bool else element


def _stop(node: fx.Node) -> Value:
    raise Unreadable(node)


def _broadcast(node: fx.Node, indices: Indices) -> Indices:
    sizes = sizes_of(node)
    kept = indices[len(indices) - len(sizes) :]
    return tuple(sympy.Integer(0) if size == 1 else i for size, i in zip(sizes, kept, strict=True))


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


def _as_dtype(value: Value, dtype: torch.dtype) -> Value:
    if dtype == torch.bool:
        return to_condition(value)
    if dtype.is_floating_point:
        return lift(lambda x: torch.tensor(x, dtype=dtype).item(), to_float(value))
    return lift(lambda x: _as_integer(x, dtype), to_number(value))


def _as_integer(value: Value, dtype: torch.dtype) -> Value:
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


def _operands(reader: Reader, node: fx.Node, indices: Indices, names: Sequence[str]) -> list[Value]:
    return [reader.operand(argument(node, i, name), indices) for i, name in enumerate(names)]


@reads("arange.default", "arange.start", "arange.start_step")
def _arange(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    if node.meta["val"].dtype not in (torch.int32, torch.int64):
        raise Unreadable(node)
    has_start = node.target is not aten.arange.default
    start = size_expr(node.args[0]) if has_start else sympy.Integer(0)
    stride = size_expr(argument(node, 2, "step", 1)) if has_start else sympy.Integer(1)
    return start + stride * indices[0]


@reads("ones", "new_ones", "ones_like")
def _ones(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return sympy.Integer(1)


@reads("zeros", "new_zeros", "zeros_like")
def _zeros(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return sympy.Integer(0)


@reads("full.default", "full_like.default", "new_full.default")
def _full(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    place = 2 if node.target is aten.new_full.default else 1
    return reader.operand(argument(node, place, "fill_value"), ())


@reads("scalar_tensor.default")
def _scalar_tensor(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return reader.operand(node.args[0], ())


@reads("to", "_to_copy", "type_as", "detach")
def _cast(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return reader.operand(node.args[0], indices)


def _arithmetic(name: str, on_numbers: Callable[[Any, Any], Any]) -> None:
    def read(reader: Reader, node: fx.Node, indices: Indices) -> Value:
        a, b = _operands(reader, node, indices, ("self", "other"))
        alpha = reader.operand(argument(node, 2, "alpha", 1), ())
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            if name not in ("add", "mul"):
                raise Unreadable(node)
            return (sympy.Or if name == "add" else sympy.And)(to_condition(a), to_condition(b))
        convert = to_float if dtype.is_floating_point else to_number
        a, b = convert(a), convert(b)
        scale = to_float(alpha) if dtype.is_floating_point else alpha

        def compute(x: Any, y: Any) -> Any:
            if not dtype.is_floating_point and (isinstance(x, float) or isinstance(y, float)):
                raise Unreadable(node)
            return on_numbers(y, x * scale) if name == "rsub" else on_numbers(x, y * scale)

        return lift(compute, a, b)

    reads(f"{name}.Tensor", f"{name}.Scalar")(read)


_arithmetic("add", operator.add)
_arithmetic("sub", operator.sub)
_arithmetic("rsub", operator.sub)
_arithmetic("mul", operator.mul)


@reads("div.Tensor", "div.Scalar", "true_divide")
def _divide(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = (to_float(x) for x in _operands(reader, node, indices, ("self", "other")))
    if not isinstance(b, float) or b == 0:
        raise Unreadable(node)
    return lift(operator.truediv, a, b)


@reads("floor_divide", "div.Tensor_mode", "div.Scalar_mode")
def _floor_divide(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = _operands(reader, node, indices, ("self", "other"))
    mode = node.kwargs.get("rounding_mode", "floor")
    if not is_int(a) or not isinstance(b, sympy.Integer) or b <= 0:
        raise Unreadable(node)
    if mode != "floor" and not (mode == "trunc" and a.is_nonnegative):
        raise Unreadable(node)
    return reader.space.div(a, int(b))


@reads("remainder.Tensor", "remainder.Scalar")
def _remainder(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = _operands(reader, node, indices, ("self", "other"))
    if not is_int(a) or not isinstance(b, sympy.Integer) or b <= 0:
        raise Unreadable(node)
    return reader.space.mod(a, int(b))


@reads("neg.default")
def _neg(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return lift(operator.neg, to_number(reader.operand(node.args[0], indices)))


@reads("abs.default")
def _abs(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    return lift(abs, to_number(reader.operand(node.args[0], indices)))


@reads("minimum.default", "maximum.default")
def _extremum(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    a, b = _operands(reader, node, indices, ("self", "other"))
    first = "le" if node.target is aten.minimum.default else "ge"
    return select(compare(first, a, b), to_number(a), to_number(b))


@reads("clamp.default", "clamp_min.default", "clamp_max.default")
def _clamp(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    value = to_number(reader.operand(node.args[0], indices))
    low = argument(node, 1, "min") if node.target is not aten.clamp_max.default else None
    place = 2 if node.target is aten.clamp.default else 1
    high = argument(node, place, "max") if node.target is not aten.clamp_min.default else None
    if low is not None:
        bound = reader.operand(low, ())
        value = select(compare("lt", value, bound), bound, value)
    if high is not None:
        bound = reader.operand(high, ())
        value = select(compare("gt", value, bound), bound, value)
    return value


def _comparison(*names: str) -> None:
    def read(reader: Reader, node: fx.Node, indices: Indices) -> Value:
        a, b = _operands(reader, node, indices, ("self", "other"))
        return compare(names[0], a, b)

    reads(*(f"{name}.{overload}" for name in names for overload in ("Tensor", "Scalar")))(read)


_comparison("le", "less_equal")
_comparison("lt", "less")
_comparison("ge", "greater_equal")
_comparison("gt", "greater")
_comparison("eq")
_comparison("ne", "not_equal")


def _logical(function: Callable[..., Value], *names: str) -> None:
    def read(reader: Reader, node: fx.Node, indices: Indices) -> Value:
        is_bitwise = not str(node.target).startswith("aten.logical")
        if is_bitwise and node.meta["val"].dtype != torch.bool:
            raise Unreadable(node)
        operands = _operands(reader, node, indices, ("self", "other")[: len(node.args)])
        return function(*map(to_condition, operands))

    reads(*names)(read)


_logical(sympy.And, "logical_and", "bitwise_and.Tensor", "bitwise_and.Scalar", "__and__.Tensor", "__and__.Scalar")
_logical(sympy.Or, "logical_or", "bitwise_or.Tensor", "bitwise_or.Scalar", "__or__.Tensor", "__or__.Scalar")
_logical(negate, "logical_not", "bitwise_not")


@reads("logical_xor", "bitwise_xor.Tensor", "bitwise_xor.Scalar", "__xor__.Tensor", "__xor__.Scalar")
def _xor(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    if node.meta["val"].dtype != torch.bool:
        raise Unreadable(node)
    a, b = map(to_condition, _operands(reader, node, indices, ("self", "other")))
    return sympy.Or(sympy.And(a, negate(b)), sympy.And(negate(a), b))


@reads("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    condition, then, other = _operands(reader, node, indices, ("condition", "self", "other"))
    dtype = node.meta["val"].dtype
    return select(to_condition(condition), _as_dtype(then, dtype), _as_dtype(other, dtype))


@reads("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    value, mask, fill = _operands(reader, node, indices, ("self", "mask", "value"))
    dtype = node.meta["val"].dtype
    return select(to_condition(mask), _as_dtype(fill, dtype), _as_dtype(value, dtype))


@reads("tril.default", "triu.default")
def _triangle(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    row, column = indices[-2:]
    above = column - row - size_expr(argument(node, 1, "diagonal", 0))
    keep = at_least_zero(-above if node.target is aten.tril.default else above)
    dtype = node.meta["val"].dtype
    return select(keep, reader.operand(node.args[0], indices), _as_dtype(sympy.Integer(0), dtype))


@reads("cat.default", "concat.default")
def _cat(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    parts = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0) % len(indices)
    return _concatenated(reader, list(parts), indices, dim)


def _concatenated(reader: Reader, parts: list[fx.Node], indices: Indices, dim: int) -> Value:
    first, rest = parts[0], parts[1:]
    if not rest:
        return reader.element(first, _at(indices, dim, indices[dim], first))
    size = sizes_of(first)[dim]
    past = at_least_zero(indices[dim] - size)
    if past == sympy.true:
        return _concatenated(reader, rest, _at(indices, dim, indices[dim] - size), dim)
    inside = reader.element(first, _at(indices, dim, indices[dim], first))
    if past == sympy.false:
        return inside
    return select(negate(past), inside, _concatenated(reader, rest, _at(indices, dim, indices[dim] - size), dim))


def _at(indices: Indices, dim: int, new: Any, part: fx.Node | None = None) -> Indices:
    if part is not None and sizes_of(part)[dim] == 1:
        new = sympy.Integer(0)
    return (*indices[:dim], new, *indices[dim + 1 :])


@reads("diff.default")
def _diff(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    n, dim = argument(node, 1, "n", 1), argument(node, 2, "dim", -1)
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if n != 1 or node.meta["val"].dtype == torch.bool:
        raise Unreadable(node)
    dim %= len(indices)
    parts = [part for part in (prepend, x, append) if part is not None]
    before = _concatenated(reader, parts, indices, dim)
    after = _concatenated(reader, parts, _at(indices, dim, indices[dim] + 1), dim)
    return lift(operator.sub, to_number(after), to_number(before))


@reads("cumsum.default")
def _cumsum(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    dim = argument(node, 1, "dim") % len(indices)
    x: Any = node.args[0]
    summand = to_number(reader.element(x, _at(indices, dim, reader.fresh_index(), x)))
    if not isinstance(summand, sympy.Integer):
        raise Unreadable(node)
    return summand * (indices[dim] + 1)


@reads("index.Tensor")
def _index(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    selectors: list[Any] = list(argument(node, 1, "indices"))
    rank = len(shape_of(x))
    selectors += [None] * (rank - len(selectors))
    tensors = [s for s in selectors if s is not None]
    if any(s.meta["val"].dtype not in (torch.int32, torch.int64) for s in tensors):
        raise Unreadable(node)
    dims = [d for d, s in enumerate(selectors) if s is not None]
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    first = dims[0] if adjacent else 0  # where the dims of the selectors stand in the result
    count = max(len(shape_of(s)) for s in tensors)
    selected, kept = indices[first : first + count], iter((*indices[:first], *indices[first + count :]))
    sizes = sizes_of(x)
    found = []
    for selector, size in zip(selectors, sizes, strict=True):
        if selector is None:
            found.append(next(kept))
        else:
            found.append(_position(reader.operand(selector, selected), size, node))
    return reader.element(x, tuple(found))


@reads("index_select.default")
def _index_select(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    dim = argument(node, 1, "dim") % len(indices)
    position = _position(reader.operand(node.args[2], (indices[dim],)), sizes_of(x)[dim], node)
    return reader.element(x, _at(indices, dim, position))


@reads("gather.default")
def _gather(reader: Reader, node: fx.Node, indices: Indices) -> Value:
    x: Any = node.args[0]
    dim = argument(node, 1, "dim") % len(indices)
    position = _position(reader.operand(node.args[2], indices), sizes_of(x)[dim], node)
    return reader.element(x, _at(indices, dim, position, x))


def _position(value: Value, size: Any, node: fx.Node) -> Any:
    """An index that comes from a tensor; a negative one counts from the end."""
    if is_bool(value) or not is_int(value):
        raise Unreadable(node)
    if size == 1 and value.is_nonnegative:
        return sympy.Integer(0)
    if value.is_nonnegative:
        return value
    return from_end(int(value), size) if isinstance(value, sympy.Integer) else _stop(node)
