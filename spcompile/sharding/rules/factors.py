"""Factors while a rule is being written: objects, which get their letters when the rule is complete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from string import ascii_lowercase
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.aten_ops import tensor_operands
from spcompile.graph.sizes import same
from spcompile.sharding.rules.rule import Dims, LocalCall, Move, OpRule, Size, Window, tensor_results


@dataclass(eq=False)
class Factor:
    """One index space of an op. `replicated`: the op cannot compute on a part of it."""

    size: Size
    replicated: bool = False


Dim = Factor | tuple[Factor, ...]  # major first
Layout = Sequence[Dim]  # the dims of one tensor


def factors(shape: Iterable[Size], replicated: bool = False) -> list[Factor]:
    """A new factor for every dim."""
    return [Factor(size, replicated) for size in shape]


def broadcast_factors(shape: Sequence[Size], onto: Sequence[Factor]) -> list[Dim] | None:
    """The dims of an operand of `shape` that broadcasts to `onto`; None if some size is not known to fit."""
    if len(shape) > len(onto):
        return None
    dims: list[Dim] = []
    for size, factor in zip(shape, onto[len(onto) - len(shape) :], strict=True):
        if not same(size, factor.size) and not same(size, 1):
            return None
        dims.append(factor if same(size, factor.size) else ())
    return dims


def make_rule(
    node: fx.Node,
    operands: Mapping[str, Any],
    results: Sequence[Layout],
    *,
    sums: Collection[Factor] = (),
    completes: Collection[Factor] = (),
    merges: Collection[Factor] = (),
    ordered: Collection[Factor] = (),
    contracts: Collection[Factor] = (),
    fills: Mapping[str, float] | None = None,
    local: Callable[[LocalCall], Any] | None = None,
    prefix_of: Mapping[Factor, Factor] | None = None,
    unread: Collection[str] = (),
    moves: Sequence[Move] = (),
    moved: Sequence[Factor] = (),
    windows: Mapping[Factor, tuple[Factor, Size, Size, Size, Callable[[LocalCall], Any]]] | None = None,
) -> OpRule:
    """The rule of a call. Letters go to the results' factors first, in order, then to the operands'.

    operands: the layout of every tensor argument by schema name (of a list argument: a list of layouts).
    sums: the factors that are reduced by a sum; those of them that are replicated are dropped.
    completes: the factors that are only in operands and over which `local` gives complete results; dropped likewise.
    merges: those of them of which padding must hold `fills`.
    contracts: the replicated factors that the op sums over inside.
    fills: what the padding of a summed factor must hold, by argument name; default 0 in the first operand.
    ordered, prefix_of, unread, moves, moved: as in OpRule, with factors and argument names.
    windows: of factors of the result what they are made of, as in Window; those of one element are dropped.
    """
    layouts, owners = _in_call_order(node, operands)
    _check_ranks(node, layouts, results)
    letters = _Letters()
    named_results = tuple(letters.name(layout) for layout in results)
    named_operands = tuple(letters.name(layout) for layout in layouts)
    names = letters.names
    rule = OpRule(
        operands=named_operands,
        results=named_results,
        sizes={name: factor.size for factor, name in names.items()},
        reductions={names[f]: "sum" for f in names if f in sums and not f.replicated},
        completed=frozenset(names[f] for f in names if f in {*completes, *merges} and not f.replicated),
        filled=frozenset(names[f] for f in names if f in merges and not f.replicated),
        ordered=frozenset(names[f] for f in names if f in ordered),
        replicated=frozenset(name for factor, name in names.items() if factor.replicated),
        contracted=frozenset(names[f] for f in names if f in contracts),
        fills={0: 0.0} if fills is None else {i: fills[owner] for i, owner in enumerate(owners) if owner in fills},
        local=local,
        prefix_of={names[r]: names[o] for r, o in (prefix_of or {}).items() if r in names and o in names},
        unread=frozenset(i for i, owner in enumerate(owners) if owner in unread),
        moves=tuple(moves),
        moved=tuple(names[f] for f in moved if f in names),
        windows={names[f]: Window(names[of], *more) for f, (of, *more) in (windows or {}).items() if f in names},
    )
    _check_factors(node, rule)
    return rule


class _Letters:
    """Gives letters to factors in order of first appearance; a factor of size 1 gets none."""

    def __init__(self) -> None:
        self.names: dict[Factor, str] = {}
        self._free = _letters()

    def name(self, layout: Layout) -> Dims:
        return tuple(tuple(self._letter(f) for f in _factors_of(dim) if not same(f.size, 1)) for dim in layout)

    def _letter(self, factor: Factor) -> str:
        if factor not in self.names:
            self.names[factor] = next(self._free)
        return self.names[factor]


def _letters() -> Iterator[str]:
    """From a to z, then a1 to z1 and so on."""
    for turn in count():
        yield from (f"{letter}{turn or ''}" for letter in ascii_lowercase)


def _factors_of(dim: Dim) -> tuple[Factor, ...]:
    return (dim,) if isinstance(dim, Factor) else dim


def _in_call_order(node: fx.Node, operands: Mapping[str, Any]) -> tuple[list[Layout], list[str]]:
    """The layouts in the order of `tensor_operands(node)`, with the name of the argument that each belongs to."""
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    layouts: list[Layout] = []
    owners: list[str] = []
    for name in [*schema[: len(node.args)], *node.kwargs]:
        value = node.args[schema.index(name)] if schema.index(name) < len(node.args) else node.kwargs[name]
        found = operands.get(name, [])
        of_tensors = found if isinstance(value, list | tuple) else [found] if _is_tensor(value) else []
        layouts.extend(of_tensors)
        owners.extend([name] * len(of_tensors))
    return layouts, owners


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def _check_ranks(node: fx.Node, operands: Sequence[Layout], results: Sequence[Layout]) -> None:
    wanted = [[t.meta["val"].ndim for t in tensor_operands(node)], [t.ndim for t in tensor_results(node)]]
    found = [[len(layout) for layout in operands], [len(layout) for layout in results]]
    assert found == wanted, f"rule of {node.format_node()}: ranks are {wanted}, the rule has {found}"


def _check_factors(node: fx.Node, rule: OpRule) -> None:
    """A factor that may be sharded must reach a result or be summed; else its shards would just be lost."""
    read = [dims for i, dims in enumerate(rule.operands) if i not in rule.unread]
    in_results = {factor for dims in rule.results for dim in dims for factor in dim}
    lost = (
        {factor for dims in read for dim in dims for factor in dim} - in_results - set(rule.reductions) - rule.completed
    )
    kept = rule.replicated.union(rule.moved, (window.of for window in rule.windows.values()))
    assert lost <= kept, f"rule of {node.format_node()}: {lost - kept} lost in {rule.text()}"
