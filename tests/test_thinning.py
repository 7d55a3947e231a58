"""Thinning out: every case within n seeds, every value where promised, and marks that cannot work are errors."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import thinning
from thinning import MOST, commits, left_out, runs

SIZES = [(1,), (7,), (30,), (3, 2), (6, 3, 2), (10, 6, 2), (2, 2, 2), (5, 4, 2), (11, 2)]


def grid(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*(range(size) for size in sizes)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_n_seeds_in_a_row_run_every_case_once(sizes: tuple[int, ...]) -> None:
    places = grid(sizes)
    for n in range(2, MOST + 1):
        turns = [runs(places, n, seed) for seed in range(100, 100 + n)]
        assert all(any(turn) for turn in turns) or len(places) < n
        assert all(sum(case) == 1 for case in zip(*turns, strict=True))
        assert runs(places, n, 100) == runs(places, n, 100 + n)


@pytest.mark.parametrize(("sizes", "n"), [((6, 3, 2), 6), ((10, 6, 2), 10), ((3, 3, 2), 3), ((5, 4, 2), 5)], ids=str)
def test_every_value_runs_with_every_seed(sizes: tuple[int, ...], n: int) -> None:
    places = grid(sizes)
    for seed in range(n):
        chosen = [place for place, run in zip(places, runs(places, n, seed), strict=True) if run]
        assert [len(set(column)) for column in zip(*chosen, strict=True)] == list(sizes)


class Case:
    """What is read of a pytest.Item."""

    def __init__(self, mark: pytest.Mark, **values: Any) -> None:
        self.nodeid, self.callspec = f"file.py::test[{values}]", SimpleNamespace(params=values)
        self.mark = mark

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.mark if name == "thinned" else None

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [pytest.mark.parametrize(value, []).mark for value in self.callspec.params]


def cases(*thinned: Any, **covers: Any) -> list[Any]:
    mark = pytest.mark.thinned(*thinned, **covers).mark
    return [Case(mark, a=a, b=b) for a in "xyz" for b in "pq"]


def test_cases_of_one_test_are_thinned() -> None:
    items = cases(3, covers=["b"])
    for seed in range(3):
        kept = [item for item in items if item not in left_out(items, seed)]
        assert len(kept) == 2
        assert {item.callspec.params["b"] for item in kept} == {"p", "q"}


def test_a_promise_that_does_not_hold_is_an_error() -> None:
    with pytest.raises(pytest.UsageError, match="not every a"):
        left_out(cases(6, covers=["a"]), 0)


def test_more_commits_than_thirty_are_not_waited_for() -> None:
    with pytest.raises(pytest.UsageError, match="from 2 to 30"):
        left_out(cases(31), 0)


def test_without_git_the_seed_is_fixed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commits() == 0
    monkeypatch.undo()
    monkeypatch.setattr(thinning, "__file__", str(tmp_path / "thinning.py"))
    assert commits() == 0
