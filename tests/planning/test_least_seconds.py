"""What a candidate takes at least: no more than a compile predicts; and what of many ways is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from explained import Model

from spcompile import plan_world
from spcompile.options import Options
from spcompile.plan_world import checked_options, with_depths
from spcompile.planning.candidates import Candidate, first_round, meshes
from spcompile.planning.least_seconds import least_seconds
from spcompile.planning.search import Depths
from spcompile.report.plan_table import RankedPlans, itemsize_of


def model(length: int = 4096) -> tuple[torch.nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        return Model(8), {"ids_BS": torch.zeros(2, length, dtype=torch.int64)}


def least(world: int, options: Options) -> Mapping[Candidate, float]:
    found: dict[Candidate, float] = {}
    built, inputs = model()

    def explore(depths: Depths, _: int) -> None:
        for one in first_round(meshes(world, ("tp", "cp", "dp"), depths.heads), depths.heads):
            found[one] = least_seconds(depths, one, options, itemsize_of(built))

    with_depths(built, inputs, 1, options, explore)
    return found


def planned(world: int) -> RankedPlans:
    return plan_world.plan(*model(), world, workers=1, accelerator="h100", memory="speed")


@pytest.mark.thinned(6)
def test_no_row_takes_less() -> None:
    bounds = least(2, checked_options({"accelerator": "h100"}))
    plans = planned(2)
    rows = {row.result.candidate: row.seconds for row in plans.rows}
    assert bounds.keys() <= rows.keys()
    assert all(bounds[one] <= rows[one] for one in bounds)
    assert not any("not compiled" in note for note in plans.notes)


def test_keys_through_a_network_take_longer() -> None:
    bounds = least(64, checked_options({"accelerator": "h100"}))
    best = min(bounds, key=lambda one: bounds[one])
    ring = Candidate((("cp", 64),), "ring", True, ("cp",))
    assert best.size("dp") == 2
    assert bounds[ring] > bounds[best]


@pytest.mark.thinned(6)
def test_of_many_ways_few_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_world, "MOST_COMPILED", 2)
    monkeypatch.setattr(plan_world, "TRIED_FURTHER", 0)
    plans = planned(4)
    assert len(plans.rows) == 2
    (note,) = (note for note in plans.notes if "not compiled" in note)
    assert note.startswith(f"{len(least(4, plans.options)) - 2} more ways")
