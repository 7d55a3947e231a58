"""`spcompile.compare`: tp, ring, Ulysses and hybrid side by side. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from spcompile.planning.candidates import Heads
    from spcompile.planning.search import Depths
    from spcompile.planning.ways import Way
    from spcompile.report.ways_table import WaysTable


def compare(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    world: int,
    *,
    workers: int | None = None,
    **options: Any,
) -> WaysTable:
    """What a step takes with all ranks on `tp`, or on `cp` as a ring, as Ulysses, or as a hybrid of both.

    Needs no devices. Figures are made as those of `plan`. Tables of several lengths can be added: `a + b`.

    model: its weights may be real, fake or on `meta`. inputs: of one training step, with the whole batch.
    workers: processes that compile; default: one for each core.
    options: those of `plan`.

    Raises:
        SpcompileError: an illegal option, a model without attention.
    """
    from spcompile.diagnostics import IllegalMesh
    from spcompile.machine.mesh import MOST_RANKS
    from spcompile.plan_world import checked_options, evaluator_of, with_depths
    from spcompile.planning.ways import ways
    from spcompile.report.ways_table import WaysTable

    if not isinstance(world, int) or isinstance(world, bool) or not 2 <= world <= MOST_RANKS:
        raise IllegalMesh(f"world={world!r}", legal=f"2 to {MOST_RANKS} ranks")
    chosen = checked_options(options)
    found: list[tuple[Heads, list[Way]]] = []

    def explore(depths: Depths, dp: int) -> None:
        with evaluator_of(depths, chosen, workers).running() as running:
            found.append((depths.heads, ways(world, depths.heads, running.results)))

    with_depths(model, inputs, 1, chosen, explore)
    (heads, rows), *_ = found
    return WaysTable(type(model).__name__, world, chosen, {heads.tokens: rows}, heads.entries)
