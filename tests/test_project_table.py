"""The table that this project exists for: what comes out for a published shape, and what is said of its claims."""

from __future__ import annotations

from dataclasses import replace

import pytest
from project_table import EAGER, Found, Level, claims, levels_of, nearest, nearest_shape
from published import TABLE_ROWS

PLAIN = Level("Megatron SP", "llama3-8b", "tp 8, Megatron SP", 0, (), 60e9, 70e9, 0.44, 0.75, 0.14, 0.03, 1.0)


def test_the_nearest_is_found_by_bytes_and_mfu() -> None:
    least = replace(PLAIN, rung=1, activation_bytes=7.5e9, mfu_causal=0.3, mfu_full=0.58)
    found = nearest([PLAIN, least], "full")
    assert (found.level, found.batch) == (least, 2)
    assert found.distance == pytest.approx(0.0)
    assert nearest([PLAIN, least], "causal").level is least


def test_claims_are_told_with_their_figures() -> None:
    short = replace(
        PLAIN, row="no sequence parallelism", activation_bytes=49e9, total_bytes=56e9, communication_share=0.22
    )
    least = replace(short, rung=1, activation_bytes=5e9, total_bytes=12e9)
    levels = [replace(short, rung=EAGER), short, least, PLAIN, replace(PLAIN, row="ring")]
    rows = nearest_shape(levels)
    assert [one.level.row for one in rows] == list(TABLE_ROWS)
    text = "\n".join(claims(levels, [Found(short, 1, "full"), *rows[1:]]))
    assert "no sequence parallelism: does not hold: 22%" in text
    assert "Megatron SP: holds: 14%" in text
    assert "64k without it takes 105 GB and does not fit" in text
    assert "64k without it takes 17 GB and fits" in text


@pytest.mark.slow
@pytest.mark.thinned(10)
def test_megatron_sp_at_128k_comes_out_with_whole_layers_made_again() -> None:
    """15 GB and 58%: Llama 3 8B with four rows in the batch, if attention counts in full."""
    found = nearest(levels_of("llama3-8b", "Megatron SP"), "full")
    assert found.gb == pytest.approx(15, rel=0.2)
    assert found.mfu == pytest.approx(0.58, abs=0.03)
    assert found.level.mfu_causal < 0.4
    assert found.level.communication_share < 0.15
