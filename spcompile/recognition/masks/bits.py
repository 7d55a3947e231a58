"""Scores that are multiplied by a mask of 0 and 1: what is added where it is 0 takes the place of the score.

    w * b - 1e4 * (1 - b)       is w where b is 1, and -1e4 where it is 0

The product alone excludes nothing, since 0 is a score like others. A number that is added to the same keys does, and
one that is added to more keys makes the product say nothing, if every row has a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch.fx as fx
from sympy.logic.boolalg import Boolean

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.recognition.masks.bias_terms import BiasTerm, Reading
from spcompile.recognition.masks.fills import NotKnown, reader_of, reading_of
from spcompile.recognition.masks.index_maps import IndexSpace, sizes_of
from spcompile.recognition.masks.match import clauses, every_row_has_a_key
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.values import Select, Unreadable, Value, is_bool


def is_of_bits(node: fx.Node) -> bool:
    """Whether a tensor provably holds nothing but 0 and 1, by conditions over its indices."""
    space = IndexSpace()
    indices = tuple(space.add(f"i{dim}", size) for dim, size in enumerate(sizes_of(node)))
    try:
        return _is_bit(Reader(space).element(node, indices))
    except Unreadable:
        return False


def _is_bit(value: Value) -> bool:
    if isinstance(value, Select):
        return _is_bit(value.then) and _is_bit(value.other)
    return is_bool(value) or value in (0, 1)


def filled(
    parts: Sequence[BiasTerm], replaced: Mapping[BiasTerm, float], q: fx.Node, k: fx.Node
) -> tuple[list[BiasTerm], dict[BiasTerm, float]]:
    """The terms of a bias and what scores became, with numbers that exclude keys in the place of small ones.

    parts: the last one applied first. q [B, N, S, H], k [B, G, T, H].

    Raises:
        NotKnown: scores are replaced by a number that excludes nothing, and what is added there does not either.
    """
    small = [part for part in parts if replaced.get(part, EXCLUDES) > EXCLUDES]
    if not small:
        return list(parts), dict(replaced)
    reader, indices = reader_of(q, k)
    readings = {part: reading_of(part, reader, indices) for part in parts}
    left, fills = list(parts), dict(replaced)
    for part in small:
        after = [term for term in left[: left.index(part)] if _excludes(readings[term], readings[part])]
        if not after:
            raise NotKnown(part.node, "masked scores are not replaced by a large negative number")
        same = next((term for term in after if _bit_clauses(readings[term]) == _bit_clauses(readings[part])), None)
        if same is not None:
            (number,) = readings[same].fills  # type: ignore[union-attr]
            fills[part] += number
            left.remove(same)
        else:
            total = sympy.And(*(r.condition for r in readings.values() if r is not None))
            if any(r is None for r in readings.values()) or not every_row_has_a_key(
                total, sizes_of(q)[2], sizes_of(k)[2]
            ):
                raise NotKnown(part.node, "some row may have no key, and scores of others count there")
            left.remove(part)
            del fills[part]
    return left, fills


def _excludes(term: Reading | None, mask: Reading | None) -> bool:
    """Whether a term adds one number that excludes keys to all that the mask leaves out."""
    if term is None or mask is None or len(term.fills) != 1 or max(term.fills) > EXCLUDES:
        return False
    return clauses(sympy.And(term.condition, mask.condition)) == clauses(term.condition)


def _bit_clauses(reading: Reading | None) -> list[Boolean]:
    assert reading is not None
    return clauses(reading.condition)
