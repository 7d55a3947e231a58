"""`spcompile plan --solve`: costs as expressions of the length. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from spcompile.planning.cost_curves import Curve
    from spcompile.planning.figures import Figures
    from spcompile.report.solve_table import SolvedLengths

Build = Callable[[int, int], tuple["nn.Module", Mapping[str, Any]]]


def solve(
    build: Build, worlds: Sequence[int], tokens: int, entries: int = 1, *, workers: int | None = None, **options: Any
) -> SolvedLengths:
    """Expressions for every strategy on so many ranks, from programs of three lengths and two batches at two depths.

    build: the model and its inputs for so many tokens a row and entries in the batch; weights may be on `meta`.
    tokens: the shortest of the lengths, the others are 4 and 16 times as long.
    options: as of `spcompile.plan`.

    Raises:
        SpcompileError: an illegal option, a model without attention or without equal layers, no mesh of so many ranks.
    """
    from spcompile.diagnostics import IllegalModel
    from spcompile.plan_world import checked_options, evaluator_of, with_depths
    from spcompile.planning.candidates import compared_strategies
    from spcompile.planning.cost_curves import curve_through, points_from
    from spcompile.planning.search import at_both_ends
    from spcompile.report.solve_table import SolvedLengths

    chosen = checked_options(options)
    points = points_from(tokens, entries)
    rows: list[list[list[tuple[Figures, ...]] | str]] = []
    known: dict[str, Any] = {}

    def explore(depths: Any, _: int) -> None:
        if not depths.is_extrapolated:
            raise IllegalModel("no layers were found that are equal", legal="a model of which several layers are")
        known["layers"], known["depths"] = depths.count, tuple(short.blocks for short in depths.shorts)
        known.setdefault("strategies", compared_strategies(worlds, depths.heads))
        with evaluator_of(depths, chosen, workers, at_both_ends).running() as running:
            rows.append(running.results(known["strategies"]))

    for point in points:
        model, inputs = build(point.tokens, point.entries)
        with_depths(model, inputs, 1, chosen, explore)
    curves: list[Curve] = []
    refused: dict[str, str] = {}
    for candidate, found in zip(known["strategies"], zip(*rows, strict=True), strict=True):
        errors = [one for one in found if isinstance(one, str)]
        if errors:
            refused[candidate.name] = errors[0]
            continue
        for least in (False, True):
            figures = [one[int(least)] for one in found if not isinstance(one, str)]
            curves.append(curve_through(candidate, least, points, known["depths"], figures))
    return SolvedLengths(type(model).__name__, known["layers"], entries, chosen, points, curves, refused)
