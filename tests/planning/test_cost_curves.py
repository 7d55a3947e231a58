"""Costs as expressions of the length: they go through what was compiled, and hold at lengths that were not."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from explained import Model

import spcompile
from spcompile.passes import PIPELINE
from spcompile.plan_world import checked_options, with_depths
from spcompile.planning import candidates
from spcompile.planning.candidates import Candidate, Heads, compared_strategies
from spcompile.planning.cost_curves import (
    B,
    Curve,
    L,
    Point,
    S,
    crossings,
    curve_through,
    longest_that_fits,
    points_from,
)
from spcompile.planning.figures import Figures, extrapolated
from spcompile.planning.search import BothEnds, Depths, at_both_ends
from spcompile.report.solve_table import SolvedLengths
from spcompile.solve_lengths import solve

RING = Candidate((("cp", 2),), "ring", True, ("cp",))
ULYSSES = Candidate((("cp", 2),), "ulysses", True, ("cp",))


def figures(tokens: int, entries: int, blocks: int) -> Figures:
    """Of a model that is known by heart."""
    rows = tokens * entries
    return Figures(
        seconds=blocks * (1e-12 * tokens * rows + 1e-8 * rows) + 1e-3,
        compute=0.0,
        communication=0.0,
        exposed=0.0,
        again=0.0,
        parameters=1000 * blocks + 500,
        gradients=0.0,
        states=0.0,
        saved=16 * rows * blocks + 4 * tokens,
        peaks=(20.0 * rows * blocks, 7.0 * rows, 0.0),
        products=0.0,
        attention=0.0,
        attention_full=0.0,
    )


def curve(candidate: Candidate = RING, least: bool = False) -> Curve:
    points = points_from(1024, 1)
    rows = [[figures(point.tokens, point.entries, blocks) for blocks in (2, 4)] for point in points]
    return curve_through(candidate, least, points, (2, 4), rows)


def test_an_expression_is_exact_for_what_is_linear_in_its_terms() -> None:
    found = curve()
    assert sympy.expand(found.saved - (16 * S * B * L + 4 * S)) == 0
    total = found.total.subs({S: 3000, B: 5, L: 7})
    assert total == 1000 * 7 + 500 + 20 * 3000 * 5 * 7
    seconds = found.seconds.subs({S: 100_000, B: 2, L: 32})
    assert float(seconds) == pytest.approx(figures(100_000, 2, 32).seconds, rel=1e-9)


def test_the_longest_context_and_where_two_strategies_cross() -> None:
    total = curve().total.subs({B: 1, L: 4})
    assert longest_that_fits(total, 4500 + 80 * 1000, 1 << 20) == 1000
    assert longest_that_fits(total, 4500, 1 << 20) is None
    assert longest_that_fits(total, 1 << 60, 1 << 20) == 1 << 20
    slow_start, steep = S + 100, S**2 / 1000 + sympy.Rational(1, 2) * S
    assert crossings(slow_start, steep, 1, 10_000) == [(653, True)]
    assert crossings(steep, slow_start, 1, 10_000) == [(653, False)]
    assert crossings(steep, steep, 1, 10_000) == []
    assert crossings(slow_start, steep, 1, 600) == []


def test_what_is_solved_is_told() -> None:
    options = spcompile.options.Options.parse({"outputs": "loss", "memory": "80GiB"})
    curves = [curve(one, least) for one in (RING, ULYSSES) for least in (False, True)]
    found = SolvedLengths("Model", 4, 1, options, points_from(1024, 1), curves, {"tp=2": "no such heads"})
    text, data = str(found), found.to_dict()
    assert "cp=2, ulysses beats cp=2, ring at all lengths" in text
    assert "Left out   tp=2: no such heads" in text
    assert "2 ranks: up to" in text
    assert data["strategies"][0]["fits_up_to_tokens"] == (80 * 2**30 - 4500) // 80
    assert sympy.sympify(data["strategies"][0]["saved"], locals={"S": S, "B": B, "L": L}) == curve().saved


def test_what_is_compared() -> None:
    found = compared_strategies([8, 16, 64], Heads((32,), 1 << 20, 1))
    names = [one.name for one in found]
    assert names[:2] == ["cp=8, ring", "cp=8, ulysses"]
    assert {"tp=8, plain Megatron", "tp=8", "cp=2 tp=8, ring", "cp=2 tp=8, ulysses", "cp=8 tp=8, ring"} <= set(names)
    assert not any(name.startswith("tp=16") for name in names)
    assert any("ulysses 8 x ring 8" in name for name in names)


@pytest.mark.slow
@pytest.mark.thinned(10)
def test_expressions_hold_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "compared_strategies", lambda worlds, heads: [RING])

    def build(tokens: int, entries: int) -> tuple[torch.nn.Module, dict[str, Any]]:
        with torch.device("meta"):
            return Model(6), {"ids_BS": torch.zeros(entries, tokens, dtype=torch.int64)}

    found = solve(build, [2], 4096, workers=1)
    between, options = Point(32768, 3), checked_options({})
    compiled: list[BothEnds | str] = []
    blocks: list[int] = []

    def explore(depths: Depths, _: int) -> None:
        compiled.append(at_both_ends({}, depths, RING, options, PIPELINE))
        blocks.extend(short.blocks for short in depths.shorts)

    with_depths(*build(between.tokens, between.entries), 1, options, explore)
    (ends,) = compiled
    assert isinstance(ends, BothEnds)
    exact = extrapolated(*ends.nothing, (blocks[0], blocks[1]), found.layers)
    plain, least = found.curves
    values = {S: between.tokens, B: between.entries, L: found.layers}
    assert int(plain.saved.subs(values)) == exact.saved
    assert float(plain.total.subs(values)) == pytest.approx(exact.total, rel=0.02)
    assert float(plain.seconds.subs(values)) == pytest.approx(exact.seconds, rel=0.05)
    assert plain.saved.subs(values) >= least.saved.subs(values)
