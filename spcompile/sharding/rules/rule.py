"""What a sharding rule is: an op described once, as an einsum over named factors.

    linear      "b s i, o i, o -> b s o | i: sum"
    view        "b s (h d) -> b s h d"
    softmax     "b s [k] -> b s [k]"

A tensor dim is a product of factors, major first; a dim of size 1 has none and is written `1`. A factor that is only
in operands is reduced: sharding it leaves partial results that the reduction named after `|` completes. A factor in
brackets can not be sharded by this op (it mixes positions), but still names the same index space on both sides.
The idea of factors and of compound factors is from openxla/shardy, docs/propagation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from spcompile.diagnostics import IllegalPlugin, source_of

if TYPE_CHECKING:
    import torch
    import torch.fx as fx
    from torch import Tensor

Size = Any  # int or SymInt
Dims = tuple[tuple[str, ...], ...]


class Ranks(Protocol):
    """What a local form may ask the ranks of the axis, on which its factor is split contiguously."""

    def first(self, length: Size, device: torch.device) -> Tensor:
        """Global index, int32 [], of this rank's first element of a dim of `length`."""

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [...] as [degree, ...], invariant."""


@dataclass(frozen=True)
class LocalCall:
    """One op on one rank's shards.

    args, kwargs: as in the global graph, with every tensor replaced by its local tensor (traced).
    shapes: local shape of every result.
    degree: how many ranks the chosen factor is split over.
    factor: name of the chosen factor; global_size: its global size.
    ranks: the other ranks, for a local form that needs them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: tuple[tuple[Size, ...], ...]
    factor: str
    global_size: Size
    degree: int
    ranks: Ranks | None = None


@dataclass(frozen=True)
class Move:
    """Elements of a dim that an op puts elsewhere: `count` from `start` on, of one operand, `to` a place in one result.

    dim: the tensor dim of the operand; the result has it too, unless the op selects a single element.
    """

    operand: int
    result: int
    dim: int
    start: Size
    to: Size
    count: Size


@dataclass(frozen=True)
class Window:
    """What an op reads to make a dim: element i is made of `extent` elements of another dim, from `step` * i - `before`
    on, with 0 beyond its ends.

    of: the factor of that dim, which is in the first operand only.
    local: runs the op on a part of that dim which is just what a part of the result is made of, without padding there.
    """

    of: str
    step: Size
    before: Size
    extent: Size
    local: Callable[[LocalCall], Any]


@dataclass(frozen=True)
class OpRule:
    """The sharding rule of one call.

    operands: for every tensor operand, in the order of `tensor_operands(node)`: its dims as tuples of factor names.
    results: the same for every tensor result.
    sizes: global size of each factor.
    reductions: for each factor that is only in operands and may be sharded: "sum" (the only one that is differentiable
        through a plain all-reduce).
    completed: factors that are only in operands, and over which `local` gives the complete result, not a partial one.
    filled: those of them of which padding must hold `fills`, as of a factor that is reduced.
    ordered: factors of which every rank must have elements that stand together, since `local` asks for the first.
    replicated: factors that this op cannot compute on shards.
    contracted: those of them that it sums over inside, as a product with a weight does.
    fills: for a reduction over a padded factor, or one that is `filled`: {operand index: value that
        padding must have}. Default: 0 for operand 0.
    paired: operand dims that are sharded together with a factor although they are another index space:
        {factor: other factor} (attention's key length follows its query length).
    local: runs the op on shards, where calling it with the global arguments would be wrong (shape arguments, means).
    prefix_of: {result factor: operand factor} where a result dim is the first elements of an operand dim (slices that
        start at 0): both are replicated for this op, but the engine may lay them out together.
    moves: what the op does where ranks send each other what they move; results hold 0 where nothing goes.
    moved: the factors of the dims that it reads from and writes to, which are split together, each laid out by itself.
        The first is the one that is chosen.
    windows: of the factors of the result of which each element is made of some neighbours: what of. Both dims are laid
        out by themselves, and ranks send each other what windows have in common.
    mirrored: the factors whose elements the op puts in reverse order, where ranks send each other those.
    summed_up: those along which it gives running sums, where ranks send each other the sums of their parts.
    unread: operands of which the op reads only the shape, dtype or device (zeros_like, type_as): they may be sharded in
        any way, whatever their dims say.
    apart: the rule where every rank has parts of its own from the start, as over dp, and cannot have the whole. It is
        told the sizes of the finest factors of every dim of the first operand.
    moving: the rule where ranks may send each other what the op moves, as over cp.
    alone: the same of a prefix that is to have a layout of its own.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: Mapping[str, Size]
    reductions: Mapping[str, str] = field(default_factory=dict)
    completed: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()
    ordered: frozenset[str] = frozenset()
    replicated: frozenset[str] = frozenset()
    contracted: frozenset[str] = frozenset()
    fills: Mapping[int, float] = field(default_factory=lambda: {0: 0.0})
    paired: Mapping[str, str] = field(default_factory=dict)
    prefix_of: Mapping[str, str] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    moved: tuple[str, ...] = ()
    windows: Mapping[str, Window] = field(default_factory=dict)
    mirrored: frozenset[str] = frozenset()
    summed_up: frozenset[str] = frozenset()
    local: Callable[[LocalCall], Any] | None = None
    unread: frozenset[int] = frozenset()
    apart: Callable[[Sequence[Sequence[Size]]], OpRule] | None = None
    moving: OpRule | None = None
    alone: OpRule | None = None

    def text(self) -> str:
        """The rule as one line."""
        left = ", ".join(self._tensor(dims) for dims in self.operands)
        right = ", ".join(self._tensor(dims) for dims in self.results)
        notes = [f"{factor}: {kind}" for factor, kind in self.reductions.items()]
        notes += [f"{factor}: complete" for factor in sorted(self.completed)]
        notes += [f"{factor}: moved" for factor in sorted(self.moved)]
        notes += [f"{factor}: mirrored" for factor in sorted(self.mirrored)]
        notes += [f"{factor}: summed up" for factor in sorted(self.summed_up)]
        notes += [f"{factor}: of {window.of}" for factor, window in sorted(self.windows.items())]
        return f"{left} -> {right}".lstrip() + (f" | {', '.join(notes)}" if notes else "")

    def _tensor(self, dims: Dims) -> str:
        return " ".join(self._dim(dim) for dim in dims) if dims else "()"

    def _dim(self, dim: tuple[str, ...]) -> str:
        names = [f"[{f}]" if f in self.replicated else f for f in dim]
        return "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"


Rule = Callable[["fx.Node"], OpRule | None]
_REGISTRY: dict[Any, Rule] = {}


def register(*ops: Any) -> Callable[[Rule], Rule]:
    """Declare the rule of some OpOverloads. Two rules for one op are an error.

    A string "namespace::name" stands for all overloads of an op of a library that need not be installed.
    """

    def add(rule: Rule) -> Rule:
        for op in ops:
            if op in _REGISTRY:
                raise ValueError(f"{op} has a rule already: {_REGISTRY[op].__name__}")
            _REGISTRY[op] = rule
        return rule

    return add


def rule_of(node: fx.Node) -> OpRule | None:
    """The rule of this call; None where there is none, or where this form of the call has none."""
    schema = getattr(node.target, "_schema", None)
    rule = _REGISTRY.get(node.target) or _REGISTRY.get(schema.name if schema is not None else None)
    return None if rule is None else _outside(rule, node) if _is_from_outside(rule) else rule(node)


def _outside(rule: Rule, node: fx.Node) -> OpRule | None:
    """What a plugin's rule says of a call.

    Raises:
        IllegalPlugin: it fails, or what it says does not fit the call.
    """
    name = f"the sharding rule {rule.__module__}.{rule.__name__} of {node.target}"
    try:
        made = rule(node)
    except Exception as error:
        raise IllegalPlugin(f"{name} failed: {type(error).__name__}: {error}", where=source_of(node)) from error
    if made is None:
        return None
    if not isinstance(made, OpRule):
        raise IllegalPlugin(f"{name} gives a {type(made).__name__}", where=source_of(node), legal="an OpRule, or None")
    from spcompile.graph.aten_ops import tensor_operands

    wanted = [t.meta["val"].ndim for t in tensor_operands(node)], [t.ndim for t in tensor_results(node)]
    found = [len(dims) for dims in made.operands], [len(dims) for dims in made.results]
    if found != wanted:
        text = f"{name} has operands and results of {found} dims, the call of {wanted}"
        raise IllegalPlugin(text, where=source_of(node), legal="each tensor with all of its dims")
    return made


def _is_from_outside(rule: Rule) -> bool:
    return rule.__module__.partition(".")[0] != "spcompile"


def rules_from_outside() -> Mapping[Any, Rule]:
    """Those that are not this package's own."""
    return {op: rule for op, rule in _REGISTRY.items() if _is_from_outside(rule)}


@contextmanager
def registered_all_or_none() -> Iterator[None]:
    """Rules that are registered inside stay only if nothing is raised."""
    known = dict(_REGISTRY)
    try:
        yield
    except BaseException:
        _REGISTRY.clear()
        _REGISTRY.update(known)
        raise


def registered_ops() -> list[Any]:
    """All ops that have a rule of their own."""
    return [op for op in _REGISTRY if not isinstance(op, str)]


def registered_rules() -> Mapping[Any, Rule]:
    """Every op that has a rule, with the function that makes it."""
    return dict(_REGISTRY)


def tensor_results(node: fx.Node) -> list[Tensor]:
    """The example values of the tensor results of a call (several for split, topk, attention)."""
    import torch

    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return [val]
    return [v for v in val if isinstance(v, torch.Tensor)] if isinstance(val, Sequence) else []
