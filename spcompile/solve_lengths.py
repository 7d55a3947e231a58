"""`spcompile plan --solve`: costs as expressions of the length. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from spcompile.planning.candidates import Candidate
    from spcompile.planning.cost_curves import Curve, Point
    from spcompile.planning.search import BothEnds
    from spcompile.report.solve_table import SolvedLengths

Build = Callable[[int, int], tuple["nn.Module", Mapping[str, Any]]]


def solve(
    build: Build, worlds: Sequence[int], tokens: int, entries: int = 1, *, workers: int | None = None, **options: Any
) -> SolvedLengths:
    """Expressions for every strategy on so many ranks, from programs of three lengths and two batches at two depths.

    build: the model and its inputs for so many tokens a row and entries in the batch; weights may be on `meta`.
    tokens: the shortest of the lengths, the others are 4 and 16 times as long.
    options: as of `spcompile.plan`.

    What is made again for least to be alive is decided at the longest length.

    Raises:
        SpcompileError: an illegal option, a model without attention or without equal layers, no mesh of so many ranks.
    """
    from functools import partial

    from spcompile.diagnostics import IllegalModel
    from spcompile.plan_world import checked_options, evaluator_of, with_depths
    from spcompile.planning.candidates import compared_strategies
    from spcompile.planning.cost_curves import curve_through, points_from
    from spcompile.planning.search import at_both_ends
    from spcompile.report.solve_table import SolvedLengths

    chosen = checked_options(options)
    points = points_from(tokens, entries)
    found: dict[Point, list[BothEnds | str]] = {}
    again: dict[Candidate, Any] = {}
    known: dict[str, Any] = {}

    def explore(depths: Any, _: int) -> None:
        if not depths.is_extrapolated:
            raise IllegalModel("no layers were found that are equal", legal="a model of which several layers are")
        known["layers"], known["depths"] = depths.count, tuple(short.blocks for short in depths.shorts)
        known.setdefault("strategies", compared_strategies(worlds, depths.heads))
        with evaluator_of(depths, chosen, workers, partial(at_both_ends, again)).running() as running:
            found[point] = running.results(known["strategies"])

    for point in sorted(points, key=lambda one: -one.tokens):  # what is made again is decided at the longest
        model, inputs = build(point.tokens, point.entries)
        with_depths(model, inputs, 1, chosen, explore)
        for candidate, ends in zip(known["strategies"], found[point], strict=True):
            if not isinstance(ends, str):
                again.setdefault(candidate, ends.kinds)
    curves: list[Curve] = []
    refused: dict[str, str] = {}
    for number, candidate in enumerate(known["strategies"]):
        rows = [found[point][number] for point in points]
        errors = [one for one in rows if isinstance(one, str)]
        if errors:
            refused[candidate.name] = errors[0]
            continue
        for least in (False, True):
            figures = [one.least if least else one.nothing for one in rows if not isinstance(one, str)]
            curves.append(curve_through(candidate, least, points, known["depths"], figures))
    return SolvedLengths(type(model).__name__, known["layers"], entries, chosen, points, curves, refused)
