"""Searches for a plan of memory that take one lever alone, or all of them, whatever it costs.

Each stands in for `spcompile.memory.planner.best_of_all`.
"""

from __future__ import annotations

from collections.abc import Callable

from spcompile.memory.liveness import peak_of
from spcompile.memory.plan_search import PlanChoice, PlanSearch

TILES = 4
Search = Callable[..., PlanChoice]


def recompute(plain: PlanSearch, limit: int | None, host: int, only: int | None = None) -> PlanChoice:
    return plain.plain(plain.before_inputs)


def offload(plain: PlanSearch, limit: int | None, host: int, only: int | None = None) -> PlanChoice:
    return _with_all_on_the_host(plain, 0)


def tile(plain: PlanSearch, limit: int | None, host: int, only: int | None = None) -> PlanChoice:
    search = _tiled(plain)
    return search.with_tiles(search.plain(0))


def every(plain: PlanSearch, limit: int | None, host: int, only: int | None = None) -> PlanChoice:
    """A third of the trades; all that is still saved and can go waits on the host; and tiles."""
    search = _tiled(plain)
    return search.with_tiles(_with_all_on_the_host(search, plain.before_inputs // 3))


def _tiled(plain: PlanSearch) -> PlanSearch:
    return plain.over_tiles(TILES) or plain


def _with_all_on_the_host(search: PlanSearch, trades: int) -> PlanChoice:
    plain, clock = search.plain(trades), search.clock(trades)
    away = clock.away(clock.can_go())
    return PlanChoice(trades, away, peak_of(search.joint, plain.saved, away), plain.seconds + away.seconds, plain.saved)


LEVERS: dict[str, Search] = {"recompute": recompute, "offload": offload, "tile": tile, "every": every}
