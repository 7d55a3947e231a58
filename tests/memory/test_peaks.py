"""The plan of memory held to account: what one rank really saves and allocates is what was planned.

benchmarks/memory.py does the same for larger models and at more levels.
"""

from __future__ import annotations

import pytest
from memory import MESHES, WORST, rows_of

SIZES = {"layers": 2, "dim": 64, "heads": 4}


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(mesh))
@pytest.mark.parametrize("model", ["llama", "gpt", "bert"])
@pytest.mark.thinned(30)
def test_one_rank_takes_what_is_planned(model: str, mesh: dict[str, int], one_thread: None) -> None:
    for row in rows_of(f"models:{model}", mesh, 2048, "eager", SIZES):
        assert row["saved"] == row["saved_planned"], row
        assert abs(row["off"]) <= WORST, row
