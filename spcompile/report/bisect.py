"""Where a wrong result begins: the first pass behind which it is wrong, and the first value or gradient that differs.

Values are compared across `lower` too: a node of the LOCAL graph remembers the GLOBAL node it was traced from, whose
layout says whether the ranks hold parts of the value, copies of it, or terms of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.check.simulate import InFlight
from spcompile.diagnostics import source_of
from spcompile.machine import sequence
from spcompile.passes_api import Stage
from spcompile.program.pipeline import History, Snapshot
from spcompile.program.trace import emitted
from spcompile.report.final_run import run_final
from spcompile.report.trial import Outcome, Trial
from spcompile.report.verify_report import Culprit, difference, is_exact, largest
from spcompile.sharding.layout import layout_of
from spcompile.sharding.spaces import leaves
from spcompile.sharding.split_dims import SplitDims

Matches = Callable[[Tensor, list[Tensor]], bool]  # (value before a pass, values of all ranks behind it)


@dataclass(frozen=True)
class _Pair:
    """A node of the wrong graph with what its value must be: `expected` in a right graph, compared by `matches`."""

    node: fx.Node
    found: list[Tensor]
    expected: list[Tensor]
    matches: Callable[[list[Tensor], list[Tensor]], bool]


def culprit_of(trial: Trial) -> Culprit:
    """The first pass and the first node that are wrong; the trial's last result is."""
    right: Snapshot | None = None
    for snapshot in trial.program.history.snapshots:
        if snapshot.stage is Stage.SCHEDULE:
            break
        if not all(row.ok for row in trial.errors("", trial.run(snapshot))):
            return _first_difference(trial, right, snapshot) if right is not None else Culprit(snapshot.name)
        right = snapshot
    return _first_wrong_after_autograd(trial)


def _first_wrong_after_autograd(trial: Trial) -> Culprit:
    """Run the graphs after each pass of the SCHEDULE stage, which are made anew each time."""
    program = trial.program
    for count in range(len(program.schedule) + 1):
        graphs = emitted(replace(program, schedule=program.schedule[:count], history=History())).graphs
        outcomes = [run_final(trial, graphs, in_flight) for in_flight in get_args(InFlight)]
        if not all(isinstance(x, Outcome) and all(row.ok for row in trial.errors("", x)) for x in outcomes):
            return Culprit(program.schedule[count - 1].name if count else "autograd")
    return Culprit("an unknown one: the result is right when the passes run again")


def _first_difference(trial: Trial, right: Snapshot, wrong: Snapshot) -> Culprit:
    """The first node of `wrong` whose value differs from `right`'s, else the last whose gradient does."""
    pairs = list(_pairs(trial, right, wrong))
    for pair in pairs:
        if not pair.matches(pair.expected, pair.found):
            return Culprit(wrong.name, pair.node.name, "value", source_of(pair.node))
    for pair in reversed(pairs):
        gradients = [[_gradient(x) for x in values] for values in (pair.expected, pair.found)]
        if all(x.is_floating_point() for x in pair.found) and not pair.matches(*gradients):
            return Culprit(wrong.name, pair.node.name, "gradient", source_of(pair.node))
    return Culprit(wrong.name)


def _pairs(trial: Trial, right: Snapshot, wrong: Snapshot) -> Iterator[_Pair]:
    """Nodes that stand for the same value in both graphs, in the order of the wrong one."""
    before, after = _values_of_nodes(trial, right), _values_of_nodes(trial, wrong)
    crosses_lower = right.stage is not wrong.stage
    old = {node.name: node for node in before}
    origins = {_origin_name(node): node for node in after} if crosses_lower else {}
    for node, found in after.items():
        name = _origin_name(node) if crosses_lower else node.name
        if name not in old or (crosses_lower and origins[name] is not node):
            continue
        expected = before[old[name]]
        if not crosses_lower:
            if [x.shape for x in found] == [x.shape for x in expected]:
                yield _Pair(node, found, expected, lambda a, b: all(map(_close(trial), a, b)))
        elif (matches := _across_lower(trial, old[name])) is not None:
            yield _Pair(node, found, expected, lambda a, b, matches=matches: matches(a[0], b))  # type: ignore[misc]


def _values_of_nodes(trial: Trial, snapshot: Snapshot) -> dict[fx.Node, list[Tensor]]:
    """The values of all nodes with one tensor as result; those on the path of a gradient keep theirs."""
    kept: dict[fx.Node, list[Tensor]] = {}

    def observe(node: fx.Node, values: list[Any]) -> None:
        if all(isinstance(x, Tensor) for x in values):
            kept[node] = values
            for x in values:
                if x.requires_grad:
                    x.retain_grad()

    trial.run(snapshot, observe)
    return kept


def _origin_name(node: fx.Node) -> str:
    sources = node.meta.get("from_node") or []
    return sources[-1].name if sources else node.name


def _across_lower(trial: Trial, node: fx.Node) -> Matches | None:
    """How a GLOBAL node's value relates to the ranks' values of its LOCAL form; None if nothing is known."""
    layout = layout_of(node)
    close = _close(trial)
    if layout is None:
        return None
    axis = "cp"
    place = layout.place(axis)
    if place is None:

        def whole(expected: Tensor, found: list[Tensor]) -> bool:
            if any(x.shape != expected.shape for x in found):
                return True
            total = torch.stack(found).sum(0).to(expected.dtype)
            return all(close(expected, x) for x in found) or close(expected, total)

        return whole
    spaces = leaves(layout.dims[0][place.dim])
    split = SplitDims(axis, trial.program.ctx.mesh.size(axis), trial.program.ctx.order)
    space = spaces[place.part]
    sizes = [part.size for part in spaces]
    dim, capacity, length = place.dim + place.part, split.capacity(space), space.find().size

    def parts(expected: Tensor, found: list[Tensor]) -> bool:
        local = [*sizes[: place.part], split.local(space), *sizes[place.part + 1 :]]
        pieces = [x.unflatten(place.dim, local) for x in found]
        whole = sequence.restore_all(pieces, dim, capacity, split.order).narrow(dim, 0, length)
        return close(expected.unflatten(place.dim, sizes), whole)

    return parts


def _close(trial: Trial) -> Callable[[Tensor, Tensor], bool]:
    def close(expected: Tensor, found: Tensor) -> bool:
        tolerance = trial.tolerance * largest(expected) if not is_exact(expected) else 0.0
        return difference(found, expected) <= tolerance

    return close


def _gradient(x: Tensor) -> Tensor:
    given = x.grad if x.requires_grad else None
    return torch.zeros_like(x) if given is None else given
