"""Texts of graphs beside each other: which line became which, and which lines repeat from layer to layer.

A pass that edits a graph keeps the names of its nodes; one that traces it anew, as `lower` does, keeps the order of the
user's lines and of the ops of each. Lines that match are in the same order on both sides.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

_CALL = re.compile(r'^(?P<name>[^\s:#]+): "(?P<type>[^"]*)" = (?P<expr>.*)$')
_NAME = re.compile(r"[A-Za-z_]\w*")
_OP = re.compile(r"[\w.]+")
MOST_TRIED = 64  # distances to a next line alike, among which the length of a layer is looked for
LEAST_FOLDED = 12  # lines
_CLEARLY_MORE = 1.05


class Fold(NamedTuple):
    """`times` the same `period` rows, from `start` on."""

    start: int
    period: int
    times: int


def aligned(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Places of lines that stand for the same, in rising order on both sides; the rest was removed or is new."""
    if before == after:
        return [(place, place) for place in range(len(before))]
    by_name, by_origin = (_in_order(_matches(keys(before), keys(after))) for keys in (_by_name, _by_origin))
    return by_origin if len(by_origin) > _CLEARLY_MORE * len(by_name) else by_name


def _matches(before: Sequence[Hashable], after: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Places of keys that are in both; each is there once."""
    there = {key: place for place, key in enumerate(after) if key is not None}
    return [(place, there[key]) for place, key in enumerate(before) if key is not None and key in there]


def _by_name(lines: Sequence[str]) -> list[Hashable]:
    """The name of a node with its op; a comment or a result by its text. Of equal ones the n-th."""
    seen: Counter[Hashable] = Counter()
    keys: list[Hashable] = []
    for line in lines:
        call = _CALL.match(line)
        key = (call["name"], _op_of(call["expr"])) if call else line.partition("(")[0]
        seen[key] += 1
        keys.append((key, seen[key]))
    return keys


def _by_origin(lines: Sequence[str]) -> list[Hashable]:
    """The user's line, the op, and the how manieth of it."""
    seen: Counter[Hashable] = Counter()
    keys: list[Hashable] = []
    place = ""
    for line in lines:
        call = _CALL.match(line)
        if line.startswith("# "):
            place = line
        key = (place, _op_of(call["expr"]) if call else line.partition("(")[0])
        seen[key] += 1
        keys.append((key, seen[key]))
    return keys


def _op_of(expression: str) -> str:
    found = _OP.match(expression)
    return found[0] if found else expression


def _in_order(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of pairs, whose first places rise, whose second places rise as well."""
    tails: list[int] = []  # the least last place of a chain, by its length
    ends: list[int] = []  # of each chain the pair that it ends with
    before = [-1] * len(pairs)
    for index, (_, place) in enumerate(pairs):
        at = bisect_left(tails, place)
        before[index] = ends[at - 1] if at else -1
        if at == len(tails):
            tails.append(place)
            ends.append(index)
        else:
            tails[at], ends[at] = place, index
    chain = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chain.append(pairs[index])
        index = before[index]
    return chain[::-1]


def rows_of(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Rows of two panes: (line before, line after), -1 where there is none."""
    rows: list[tuple[int, int]] = []
    left = right = 0
    for a, b in (*aligned(before, after), (len(before), len(after))):
        rows += [(place, -1) for place in range(left, a)] + [(-1, place) for place in range(right, b)]
        rows += [(a, b)] if a < len(before) or b < len(after) else []
        left, right = a + 1, b + 1
    return rows


def without_numbers(line: str) -> str:
    """A line as all layers have it: names without what tells them apart, types and numbers as they are."""
    call = _CALL.match(line)
    if call is None:
        return line
    return f"{_unnumbered(call['name'])}: {call['type']} = {_NAME.sub(lambda m: _unnumbered(m[0]), call['expr'])}"


def _unnumbered(name: str) -> str:
    return re.sub(r"_\d+", "", name)


def folds(symbols: Sequence[Hashable]) -> list[Fold]:
    """Where rows repeat: blocks one behind another, none inside of another, each the longest that begins there."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    number: list[int] = []  # of each row among those alike
    for at, symbol in enumerate(symbols):
        number.append(len(places[symbol]))
        places[symbol].append(at)
    found: list[Fold] = []
    at, end = 0, len(symbols)
    while at < end:
        alike = places[symbols[at]]
        best = Fold(at, 0, 0)
        for following in alike[number[at] + 1 : number[at] + 1 + MOST_TRIED]:
            period = following - at
            count, block = 1, symbols[at:following]
            while symbols[at + count * period : at + (count + 1) * period] == block:
                count += 1
            if count > 1 and period * count > best.period * best.times:
                best = Fold(at, period, count)
        if best.period * best.times >= LEAST_FOLDED:
            found.append(best)
            at += best.period * best.times
        else:
            at += 1
    return found
