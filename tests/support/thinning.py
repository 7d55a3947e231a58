"""Which cases run this time: one in n of a test that is marked `thinned(n)`, others with every seed.

A test with fewer cases than n, or with none of its own, does not run with every seed.
"""

from __future__ import annotations

import subprocess
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

MOST = 30  # after so many seeds in a row every case has run


def commits() -> int:
    """The number of commits up to this one, along first parents: one more with each; 0 where git cannot tell."""
    command = ["git", "rev-list", "--count", "--first-parent", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return 0
    return int(found.stdout) if found.returncode == 0 else 0


def classes(places: Sequence[Sequence[int]], n: int) -> list[int]:
    """For each case, from its places in the lists of parameters, its class of n; with n cases none is empty.

    It is the place in the longest list plus the number of the combination of the others: a value of the longest list is
    in every class where the others have n combinations, one of the others where the longest list has n values. Where
    the numbers are too small for n classes, the cases take turns.
    """
    sizes = [max(column) + 1 for column in zip(*places, strict=True)]
    longest = max(range(len(sizes)), key=lambda at: sizes[at])
    found = []
    for place in places:
        others = 0
        for at, size in enumerate(sizes):
            others = others if at == longest else others * size + place[at]
        found.append((place[longest] + others) % n)
    return found if len(set(found)) == n else [number % n for number in range(len(places))]


def runs(places: Sequence[Sequence[int]], n: int, seed: int) -> list[bool]:
    """For each case, whether it runs with this seed."""
    return [number == seed % n for number in classes(places, n)]


def places_of(items: Sequence[pytest.Item]) -> list[tuple[int, ...]]:
    """For each case of a test, the places of its values in the lists of every `parametrize`."""
    if not hasattr(items[0], "callspec"):
        return [(0,)]
    found: list[list[int]] = [[] for _ in items]
    for mark in items[0].iter_markers("parametrize"):
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
        places: dict[tuple[int, ...], int] = {}
        for item, case in zip(items, found, strict=True):
            values = tuple(id(params_of(item)[name]) for name in names)
            case.append(places.setdefault(values, len(places)))
    return [tuple(case) for case in found]


def params_of(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params  # type: ignore[attr-defined,no-any-return]


def check(test: str, items: Sequence[pytest.Item], n: int, covers: Sequence[str]) -> None:
    """With every seed, each value of the parameters that are named in `covers` must be in a case that runs."""
    places = places_of(items)
    for name in covers:
        values = [repr(params_of(item)[name]) for item in items]
        for seed in range(n):
            chosen = {value for value, run in zip(values, runs(places, n, seed), strict=True) if run}
            if chosen != set(values):
                raise pytest.UsageError(f"{test}: with thinned({n}) and seed {seed}, not every {name} is in a case")


def left_out(items: Sequence[pytest.Item], seed: int) -> set[pytest.Item]:
    """The cases that do not run with this seed. Slow cases of a test are thinned apart from its others.

    Each test begins with another class, so that those with few cases take turns.
    """
    groups: dict[tuple[str, bool], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("manual"):
            groups[item.nodeid.partition("[")[0], item.get_closest_marker("slow") is not None].append(item)
    found: set[pytest.Item] = set()
    for (test, _), cases in groups.items():
        mark = cases[0].get_closest_marker("thinned")
        assert mark is not None
        (n,) = mark.args
        if not 2 <= n <= MOST:
            raise pytest.UsageError(f"{test}: thinned({n}), but n is from 2 to {MOST}")
        check(test, cases, n, mark.kwargs.get("covers", ()))
        chosen = runs(places_of(cases), n, seed + zlib.crc32(test.encode()))
        found |= {item for item, run in zip(cases, chosen, strict=True) if not run}
    return found
