"""Where reshapes leave the rows of the batch. Shapes are those with one row."""

from __future__ import annotations

import math

import pytest

from spcompile.sharding.row_places import NoPlace, Rows, reshaped


@pytest.mark.parametrize(
    ("old", "rows", "written", "found"),
    [  # shapes with one row
        ([1, 6, 4], Rows(0), [6, 4], Rows(0)),
        ([1, 6, 4], Rows(0), [1, 6, 2, 2], Rows(0)),
        ([6, 1, 4], Rows(1), [6, 4], Rows(0, 6)),
        ([6, 1, 4], Rows(1), [-1, 4], Rows(0, 6)),
        ([6, 1, 4], Rows(1), [6, -1], Rows(1)),
        ([6, 1, 2, 2], Rows(1), [6, 4], Rows(0, 6)),
        ([6, 1, 4], Rows(1), [6, 2, 2], Rows(1, 1, True)),
        ([6, 1], Rows(1), [6], Rows(0, 6)),
        ([6, 1, 4], Rows(1), [24], Rows(0, 6)),
        ([24], Rows(0, 6), [6, 1, 4], Rows(1)),
        ([6, 4], Rows(0, 6), [6, 1, 4], Rows(1)),
        ([6, 2, 2], Rows(1, 1, True), [6, 1, 4], Rows(1)),
        ([4, 6], Rows(1, 6), [2, 2, 6], Rows(2, 6)),
        ([1, 1, 4], Rows(1), [1, 1, 2, 2], Rows(1)),
        ([1, 4], Rows(0), [1, -1, 4], Rows(1)),
    ],
)
def test_where_a_reshape_leaves_rows(old: list[int], rows: Rows, written: list[int], found: Rows) -> None:
    new = [math.prod(old) // -math.prod(written) if size == -1 else size for size in written]
    assert reshaped(rows, old, new, written) == found


@pytest.mark.parametrize(
    ("old", "rows", "written"),
    [([1, 4], Rows(0), [1, 1, 4]), ([6, 1, 4], Rows(1), [4, 6]), ([6, 1, 2], Rows(1), [4, 3])],
)
def test_where_rows_may_be_in_two_dims_or_in_none(old: list[int], rows: Rows, written: list[int]) -> None:
    with pytest.raises(NoPlace):
        reshaped(rows, old, written, written)
