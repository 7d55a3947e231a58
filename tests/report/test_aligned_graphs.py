"""Which lines of two graphs stand for the same, and which rows repeat."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spcompile.report.aligned_graphs import Fold, aligned, folds, rows_of, without_numbers


def line(name: str, op: str = "aten.add", type_text: str = "f32[2]") -> str:
    return f'{name}: "{type_text}" = {op}(x, 1)'


def test_lines_are_matched_by_name_and_op() -> None:
    more = [line(f"e_{n}", "aten.exp") for n in range(60)]
    before = [line("a"), line("b"), line("c"), *more]
    after = [line("a"), line("new"), line("b", type_text="f32[1]"), line("c", "aten.mul"), *more]
    assert aligned(before, after)[:3] == [(0, 0), (1, 2), (3, 4)]
    assert rows_of(before, after)[:6] == [(0, 0), (-1, 1), (1, 2), (2, -1), (-1, 3), (3, 4)]


def test_lines_of_a_graph_that_was_traced_anew_are_matched_by_source_and_op() -> None:
    before = ["# m.py:1  y = x + 1", line("add_7"), line("add_8"), "# m.py:2  y * 2", line("mul_3", "aten.mul")]
    after = ["# m.py:1  y = x + 1", line("add"), line("add_1"), "# m.py:2  y * 2", line("mul", "aten.mul")]
    assert aligned(before, after) == [(n, n) for n in range(5)]


def test_lines_that_trade_places_are_not_both_matched() -> None:
    names = [f"x_{n}" for n in range(40)]
    assert len(aligned([line(n) for n in ["a", "b", *names]], [line(n) for n in ["b", "a", *names]])) == 41


@given(st.lists(st.sampled_from("abcdef")), st.lists(st.sampled_from("abcdef")))
def test_every_line_is_in_one_row_in_order(before: list[str], after: list[str]) -> None:
    left, right = ([line(name) for name in names] for names in (before, after))
    rows = rows_of(left, right)
    assert [a for a, _ in rows if a >= 0] == list(range(len(left)))
    assert [b for _, b in rows if b >= 0] == list(range(len(right)))


def test_names_are_told_apart_by_numbers_only_and_sizes_stay() -> None:
    first, second = line("linear_3"), line("linear_12")
    assert without_numbers(first) == without_numbers(second)
    assert without_numbers(line("linear", type_text="f32[4]")) != without_numbers(first)
    assert without_numbers('h: "f32[2]" = aten.mul(x_1, 2)') != without_numbers('h: "f32[2]" = aten.mul(x_1, 3)')


def test_equal_layers_are_folded_with_their_count() -> None:
    layer = list("abcabd")
    assert folds([*"xy", *layer * 5, *"z"]) == [Fold(2, 6, 5)]
    assert folds([*"xy", *layer, *"z"]) == []
    assert folds("ab" * 3) == []  # shorter than is worth a line


@given(st.lists(st.integers(0, 3), max_size=60))
def test_folds_are_repetitions_and_do_not_overlap(symbols: list[int]) -> None:
    end = 0
    for start, period, count in folds(symbols):
        assert start >= end
        block = symbols[start : start + period]
        assert symbols[start : start + period * count] == block * count
        end = start + period * count
    assert end <= len(symbols)
