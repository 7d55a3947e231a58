"""What becomes of rows that see no key, where masked scores get a large negative number that is not -inf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch.fx as fx

from spcompile.rows_without_keys import ABSORBS
from spcompile.symbolic_mask.alibi import read_linear
from spcompile.symbolic_mask.match import B, H, K, Q, clauses, every_row_has_a_key
from spcompile.symbolic_mask.parts import Part, Reading, Role, is_finite, read_part
from spcompile.symbolic_mask.reader import Reader
from spcompile.symbolic_mask.values import Unreadable
from spcompile.symbolic_mask.views import IndexSpace, Indices, sizes_of

Mask = tuple[Part, ...]  # the keys that all of them leave


class NotKnown(Exception):
    """Such rows are nothing that could be put in behind an attention; `node` is the mask that may leave some."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass(frozen=True)
class WithoutKeys:
    """What rows without keys become behind the attention. By default what spx.attention or recognize-mask makes.

    average: the mean of all values, without a gradient of scores.
    masks: all masks, where it depends on which of them exclude a key. averaged: of those, the ones that leave such a
        row the keys that it averages, each with whether their scores have a gradient.
    """

    average: bool = False
    masks: tuple[Mask, ...] = ()
    averaged: tuple[tuple[Mask, bool], ...] = ()


def rows_without_keys(
    parts: Sequence[Part], replaced: Mapping[Part, float], q: fx.Node, k: fx.Node, has_sinks: bool, has_softcap: bool
) -> WithoutKeys:
    """What is to be done for rows without keys.

    parts: the terms of its bias, the last one applied first. replaced: what scores became where a bool part excludes
    them. Numbers that were added are left to recognize-mask; here it is made sure that it can deal with them.
    q [B, N, S, H], k [B, G, T, H].

    Raises:
        NotKnown: there may be such rows, and nothing here makes them.
    """
    reader, indices = _reader(q, k)
    readings = {part: _reading(part, reader, indices) for part in parts}
    put = [part for part, fill in replaced.items() if fill != -math.inf]
    added = [part for part, r in readings.items() if part.role is Role.ADD and r is not None and r.finite]
    if not (put or added) or has_sinks or _every_row_has_a_key(readings, q, k):
        return WithoutKeys()
    mask = (put + added)[0]
    masks = put if len({replaced[part] for part in put}) == 1 else [mask]  # the same number wherever one of them holds
    others = [part for part in parts if part not in masks]
    is_only_mask = all(_excludes_nothing(part, readings[part], reader, indices) for part in others)
    reading = readings[mask]
    fills = {replaced[mask]} if put else set(reading.fills if reading is not None else ())
    absorbs = len(fills) == 1 and fills.pop() <= ABSORBS
    if is_only_mask and put and (absorbs or all(part in masks for part in parts[: len(masks)])):
        return WithoutKeys(average=True)
    if is_only_mask and added and absorbs and (not has_softcap or _is_one_for_all_heads(parts)):
        return WithoutKeys()
    two = None if is_only_mask else _of_two_masks(parts, readings, replaced, put, added, q, k)
    if two is not None:
        return two
    raise NotKnown(mask.node, _why(is_only_mask, absorbs, has_softcap))


def _of_two_masks(
    parts: Sequence[Part],
    readings: Mapping[Part, Reading | None],
    replaced: Mapping[Part, float],
    put: list[Part],
    added: list[Part],
    q: fx.Node,
    k: fx.Node,
) -> WithoutKeys | None:
    """Rows that see a key under each of two masks, but none under both.

    Keys that both exclude have the sum of two fills, so much less than one that it weighs nothing. Among those that one
    excludes the larger fill wins; equal fills weigh the same.
    """
    inner, outer = (tuple(put), tuple(added)) if put else (tuple(added[1:]), tuple(added[:1]))  # outer: added last
    known = [r for part in (*inner, *outer) if (r := readings[part]) is not None]
    if len(outer) != 1 or not inner or parts != [*outer, *inner] or len(known) != len(parts):
        return None
    of_inner = {replaced[part] for part in inner} if put else set().union(*(r.fills for r in known[: len(inner)]))
    of_outer = set(known[-1].fills)
    if len(of_inner) != 1 or len(of_outer) != 1 or not all(_is_one_for_all_heads([part]) for part in parts):
        return None
    first, last = of_inner.pop(), of_outer.pop()
    wins = last - first >= -ABSORBS
    if max(first, last) > ABSORBS or -math.inf in (first, last) or not (wins or first == last):
        return None
    one, other = (sympy.And(*(r.condition for r in rs)) for rs in (known[:-1], known[-1:]))
    if not every_row_has_a_key(one, sizes_of(q)[2], sizes_of(k)[2]):
        return None
    averaged: list[tuple[Mask, bool]] = [(inner, True)]
    if not wins and clauses(sympy.And(one, other)) != clauses(other):  # else the other leaves such a row nothing
        averaged.append((outer, not put))
    return WithoutKeys(masks=(inner, outer), averaged=tuple(averaged))


def _why(is_only_mask: bool, absorbs: bool, has_softcap: bool) -> str:
    """What such rows are, and why that is no function of sums over keys."""
    if not is_only_mask:
        return "it would average the keys that fewest of its masks exclude, and these are none that can be told apart"
    if not absorbs:
        return "the fill leaves the scores a say in its weights"
    assert has_softcap
    return "its scores, added to under a softcap, all have gradients of their own, and heads differ or have a bias too"


def _is_one_for_all_heads(parts: Sequence[Part]) -> bool:
    """Whether one mask is all that is done to the scores, and heads share it."""
    sizes = [1, 1, 1, *sizes_of(parts[0].node)]
    return len(parts) == 1 and sizes[-3] == 1


def _reader(q: fx.Node, k: fx.Node) -> tuple[Reader, Indices]:
    space = IndexSpace()
    sizes = (*sizes_of(q)[:3], sizes_of(k)[2])
    indices = tuple(space.add(symbol.name, size) for symbol, size in zip((B, H, Q, K), sizes, strict=True))
    return Reader(space), indices


def _reading(part: Part, reader: Reader, indices: Indices) -> Reading | None:
    try:
        return read_part(part, reader, indices)
    except Unreadable:
        return None


def _every_row_has_a_key(readings: Mapping[Part, Reading | None], q: fx.Node, k: fx.Node) -> bool:
    """Whether every row provably has a key that no part excludes."""
    if any(r is None and not (part.role is Role.ADD and is_finite(part.node)) for part, r in readings.items()):
        return False
    condition = sympy.And(*(r.condition for r in readings.values() if r is not None))
    return every_row_has_a_key(condition, sizes_of(q)[2], sizes_of(k)[2])


def _excludes_nothing(part: Part, reading: Reading | None, reader: Reader, indices: Indices) -> bool:
    if reading is not None:
        return reading.condition == sympy.true
    if part.role is not Role.ADD:
        return False
    if is_finite(part.node):
        return True
    try:
        read_linear(part.node, reader, indices)
    except Unreadable:
        return False
    return True
