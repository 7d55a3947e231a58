"""The peak that a plan of memory counts with, beside that of the final graphs, with and without tiles of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from memory_models import D, Decoder
from torch import nn

from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.mesh import MeshShape
from spcompile.memory import planner
from spcompile.memory.account import bytes_alive
from spcompile.memory.plan_search import PlanChoice, PlanSearch, best_of_all
from spcompile.memory.planner import MemoryPlan
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.trace import compile_for, through_dynamo

WORST = 0.03
Search = Callable[..., PlanChoice]


def planned_and_counted(
    model: nn.Module, length: int, mesh: dict[str, int], **options: Any
) -> tuple[MemoryPlan, dict[str, int]]:
    """The plan of one rank, and the most that is alive in each of the final graphs, inputs aside."""
    chosen = Options.parse(options)
    found: list[tuple[MemoryPlan, dict[str, int]]] = []

    def describe(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        sharded = compile_for(gm, inputs, MeshShape.of(mesh), chosen, PIPELINE).sharded
        accelerator, fuses = ACCELERATORS[chosen.accelerator], chosen.compiler == "inductor"
        levels = {phase: bytes_alive(phase, sharded.graphs, accelerator, fuses) for phase in sharded.graphs}
        assert sharded.memory is not None
        found.append((sharded.memory, {phase: max(alive) for phase, alive in levels.items()}))

    through_dynamo(model, (torch.randn(1, length, D, dtype=torch.float64),), describe)
    return found[0]


def only_over(tiles: int) -> Search:
    """Looks only at plans that run over so many tiles; 0: at all."""

    def search(plain: PlanSearch, limit: int | None, host: int, only: int | None = None) -> PlanChoice:
        tiled = plain.over_tiles(tiles) if tiles else None
        if tiled is None:
            return best_of_all(plain, limit, host)
        return tiled.cheapest(limit if limit is not None else tiled.least_of_all(host).peak.bytes, host)

    return search


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [
        ({"cp": 2}, "ring"),
        ({"cp": 2}, "ulysses"),
        ({"tp": 2}, "auto"),
        ({"tp": 2, "cp": 2}, "ring"),
        ({"tp": 2, "cp": 2}, "ulysses"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("p", [0.0, 0.2], ids=["plain", "dropout"])
@pytest.mark.parametrize("length", [101, 401])
@pytest.mark.parametrize("tiles", [0, 8, 32])
@pytest.mark.thinned(30)
def test_a_plan_counts_what_the_final_graphs_hold(
    tiles: int, length: int, p: float, mesh: dict[str, int], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "best_of_all", only_over(tiles))
    torch.manual_seed(0)
    options = {"memory": "min", "host_memory": 0, "attention": attention}
    plan, counted = planned_and_counted(Decoder(p).double(), length, mesh, **options)
    assert not tiles or (plan.tiles is not None and plan.tiles.count == tiles)
    assert abs(plan.peak.bytes / max(counted.values()) - 1) <= WORST
