"""What becomes of rows that see no key, where masked scores get a large negative number that is not -inf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import sympy
import torch.fx as fx

from spcompile.rows_without_keys import ABSORBS
from spcompile.symbolic_mask.alibi import read_linear
from spcompile.symbolic_mask.match import B, H, K, Q, every_row_has_a_key
from spcompile.symbolic_mask.parts import Part, Reading, Role, is_finite, read_part
from spcompile.symbolic_mask.reader import Reader
from spcompile.symbolic_mask.values import Unreadable
from spcompile.symbolic_mask.views import IndexSpace, Indices, sizes_of


class NotKnown(Exception):
    """Such rows are nothing that could be put in behind an attention; `node` is the mask that may leave some."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


def must_average(
    parts: Sequence[Part], replaced: Mapping[Part, float], q: fx.Node, k: fx.Node, has_sinks: bool, has_softcap: bool
) -> bool:
    """Whether rows without keys are to become the mean of all values behind the attention.

    parts: the terms of its bias, the last one applied first. replaced: what scores became where a bool part excludes
    them. Numbers that were added are left to recognize-mask; here it is made sure that it can deal with them.
    q [B, N, S, H], k [B, G, T, H].

    Raises:
        NotKnown: there may be such rows, and they are neither zeros nor the mean with a gradient linear in the scores.
    """
    reader, indices = _reader(q, k)
    readings = {part: _reading(part, reader, indices) for part in parts}
    put = [part for part, fill in replaced.items() if fill != -math.inf]
    added = [part for part, r in readings.items() if part.role is Role.ADD and r is not None and r.finite]
    if not (put or added) or has_sinks or _every_row_has_a_key(readings, q, k):
        return False
    mask = (put + added)[0]
    masks = put if len({replaced[part] for part in put}) == 1 else [mask]  # the same number wherever one of them holds
    others = [part for part in parts if part not in masks]
    is_only_mask = all(_excludes_nothing(part, readings[part], reader, indices) for part in others)
    reading = readings[mask]
    fills = {replaced[mask]} if put else set(reading.fills if reading is not None else ())
    absorbs = len(fills) == 1 and fills.pop() <= ABSORBS
    if is_only_mask and put and (absorbs or all(part in masks for part in parts[: len(masks)])):
        return True
    if is_only_mask and added and absorbs and (not has_softcap or _is_one_for_all_heads(parts)):
        return False
    raise NotKnown(mask.node, _why(is_only_mask, absorbs, has_softcap))


def _why(is_only_mask: bool, absorbs: bool, has_softcap: bool) -> str:
    """What such rows are, and why that is no function of sums over keys."""
    if not is_only_mask:
        return "it would average the keys that fewest of several masks exclude"
    if not absorbs:
        return "the fill leaves the scores a say in its weights"
    assert has_softcap
    return "its scores, added to under a softcap, all have gradients of their own, and heads differ or have a bias too"


def _is_one_for_all_heads(parts: Sequence[Part]) -> bool:
    """Whether one added mask is all that is done to the scores, and heads share it."""
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
