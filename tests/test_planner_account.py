"""The planner against published measurements; benchmarks/planner.py prints every row."""

from __future__ import annotations

import pytest
from held_scores import RANKS, program_of, saved_by_a_layer
from planner import Part, Row, figure7, tables
from published import CALCULON_FIGURE_7, FIGURE_7, KORTHIKANTI, Trained

# The figure has 9.42% for full recompute of the two largest models. Kept is the input of a layer, 2 bytes an element,
# beside the 21 that their own table 2 counts for tensor parallelism alone: 9.52%.
AS_READ_OFF = 0.0115


def test_errors_are_relative_to_what_was_measured() -> None:
    part = Part([Row("a", "s", 1.02, 1.0), Row("b", "s", 0.99, 1.0), Row("c", "s", 5.0, None)], 0.02, 0.01)
    assert part.mean == pytest.approx(0.015)
    assert part.worst == pytest.approx(0.02)
    assert not part.holds
    assert Part(part.rows, 0.02, 0.02 + 1e-9).holds


@pytest.mark.thinned(30)
@pytest.mark.parametrize(("way", "tolerance"), [("SP", 0.005), ("SP + selective", 0.005), ("full", 0.01)])
def test_bytes_of_a_layer_of_22b(way: str, tolerance: float) -> None:
    found = 100 * saved_by_a_layer(KORTHIKANTI["22B"], way) / saved_by_a_layer(KORTHIKANTI["22B"], "none")
    assert found == pytest.approx(FIGURE_7["22B"][way], rel=tolerance)


@pytest.mark.slow
@pytest.mark.thinned(4)
def test_figure_7() -> None:
    part = figure7(tuple(KORTHIKANTI))
    assert len(part.errors) == 16
    assert part.mean <= 0.005
    assert part.worst <= AS_READ_OFF
    assert part.mean < CALCULON_FIGURE_7[0] / 100
    assert part.worst < CALCULON_FIGURE_7[1] / 100


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_tables_4_and_5() -> None:
    part = tables(())
    assert len(part.errors) == 12
    assert part.mean <= 0.031
    assert part.worst <= 0.05


@pytest.mark.thinned(26)
def test_without_dropout_no_masks_are_kept() -> None:
    """Of scores 3 numbers of 2 bytes and a mask of 1 are 5 with dropout, and 2 without: softmax's result alone."""
    small = Trained(layers=2, heads=16, dim=128, micro_batch=2, seq=256)
    scores = small.heads * small.seq**2 * small.micro_batch / RANKS
    hidden = small.seq * small.micro_batch * small.dim
    for dropout, of_scores, of_branches in ((0.1, 5, 2), (0.0, 2, 0)):
        one, two = (program_of(small, "none", layers, dropout).saved for layers in (1, 2))
        norms = 4 * 2 * small.seq * small.micro_batch
        assert two - one == of_scores * scores + (8 + of_branches + 24 / RANKS) * hidden + norms
