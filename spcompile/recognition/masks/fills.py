"""What becomes of rows that see no key, where masked scores get a large negative number that is not -inf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
import torch.fx as fx
from sympy.logic.boolalg import Boolean

from spcompile.attention.scores.mask import EXCLUDES
from spcompile.recognition.masks.alibi import comes_from_trained_input, read_linear
from spcompile.recognition.masks.bias_terms import Applied, BiasTerm, Reading, Role, flipped, read_part
from spcompile.recognition.masks.finite import is_finite
from spcompile.recognition.masks.index_maps import IndexSpace, Indices, sizes_of
from spcompile.recognition.masks.match import B, H, K, Q, clauses, every_row_has_a_key
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.rows_without_keys import LOWEST, absorbs
from spcompile.recognition.masks.values import Unreadable


class NotKnown(Exception):
    """Such rows are nothing that could be put in behind an attention; `node` is the mask that may leave some."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass(frozen=True)
class Second:
    """An attention of the rows without keys alone.

    parts: its bias. are_scores: False where all scores have been replaced by one number, so that none counts.
    rounded_by: a number that was added, or put there before biases were added. rounded: biases to which it was added
    before both were added to scores.
    """

    parts: tuple[BiasTerm, ...]
    are_scores: bool = True
    rounded_by: float | None = None
    rounded: tuple[BiasTerm, ...] = ()


@dataclass(frozen=True)
class WithoutKeys:
    """What rows without keys become behind the attention. By default what spx.attention or recognize-mask makes.

    average: the mean of all values, without a gradient of scores.
    seconds: one attention of such rows, or two over the keys of both.
    unknown: parts that add numbers which only run time tells; they may exclude all keys of a row.
    hard: with `unknown`, the parts that exclude keys for good.
    fills: the numbers of parts that exclude keys by adding them. Beside the above they are read as conditions.
    of_bits: parts that were read as masks because their integers are taken to be 0 and 1.
    dtype: with `unknown`, what scores are rounded to once these are added.
    """

    average: bool = False
    seconds: tuple[Second, ...] = ()
    unknown: tuple[BiasTerm, ...] = ()
    hard: tuple[BiasTerm, ...] = ()
    fills: Mapping[BiasTerm, float] = field(default_factory=dict)
    of_bits: tuple[BiasTerm, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class _Mask:
    """Parts that give the keys they exclude one finite number. is_put: in the place of the score, not added to it.

    covered: biases in the place of which the number stands, though it is added to scores.
    """

    parts: tuple[BiasTerm, ...]
    fill: float
    is_put: bool
    covered: tuple[BiasTerm, ...] = ()


@dataclass(frozen=True)
class _Terms:
    """The terms of a bias by what they do, the last one applied first. hard: they exclude for good."""

    order: tuple[BiasTerm, ...]
    readings: Mapping[BiasTerm, Reading | None]
    masks: tuple[_Mask, ...]
    hard: tuple[BiasTerm, ...]
    biases: tuple[BiasTerm, ...]
    unknown: tuple[BiasTerm, ...]
    applied: Mapping[BiasTerm, Applied]

    def dtype_of(self, parts: Sequence[BiasTerm]) -> torch.dtype:
        """What scores are rounded to once these parts are applied."""
        return max((self.applied[part].dtype for part in parts), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def fills(self) -> dict[BiasTerm, float]:
        """The numbers of masks that are added."""
        finite = {part: mask.fill for mask in self.masks for part in mask.parts}
        hard = dict.fromkeys(self.hard, -math.inf)
        return {
            part: fill for part, fill in {**finite, **hard}.items() if part.role is Role.ADD or part.put is not None
        }

    def are_after(self, parts: Sequence[BiasTerm], mask: _Mask) -> bool:
        """Whether all of these are applied after the mask."""
        return all(self.order.index(part) < self.order.index(other) for part in parts for other in mask.parts)

    def biases_on(self, mask: _Mask) -> tuple[BiasTerm, ...]:
        """Those that count where the mask excludes a key."""
        left = [bias for bias in self.biases if bias not in mask.covered]
        return tuple(bias for bias in left if not mask.is_put or self.are_after([bias], mask))

    def condition(self, parts: Sequence[BiasTerm]) -> Boolean | None:
        """The keys that all of these parts leave; None if one has no symbolic form."""
        known = [reading.condition for part in parts if (reading := self.readings.get(part)) is not None]
        return sympy.And(*known) if len(known) == len(parts) else None


def rows_without_keys(
    parts: Sequence[BiasTerm],
    replaced: Mapping[BiasTerm, float],
    q: fx.Node,
    k: fx.Node,
    applied: Mapping[BiasTerm, Applied],
    has_sinks: bool,
    has_softcap: bool,
) -> WithoutKeys:
    """What is to be done for rows without keys.

    parts: the terms of its bias, the last one applied first. replaced: what scores became where a bool part excludes
    them. One number that was added is left to recognize-mask where that makes the mean of all values.
    q [B, N, S, H], k [B, G, T, H]. applied: of each part.

    Raises:
        NotKnown: there may be such rows, and nothing here makes them.
    """
    reader, indices = reader_of(q, k)
    readings = {part: reading_of(part, reader, indices) for part in parts}
    terms = _terms(parts, replaced, readings, reader, indices, applied)
    without = _without_keys(terms, q, k, has_sinks, has_softcap)
    of_bits = tuple(part for part, reading in readings.items() if reading is not None and reading.of_bits)
    return dataclasses.replace(without, of_bits=of_bits)


def _without_keys(terms: _Terms, q: fx.Node, k: fx.Node, has_sinks: bool, has_softcap: bool) -> WithoutKeys:
    if has_sinks or not (terms.masks or terms.unknown) or _every_row_has_a_key(terms, q, k):
        return WithoutKeys()
    if terms.unknown:
        if any(mask.is_put or mask.covered for mask in terms.masks):
            raise NotKnown(terms.unknown[0].node, "numbers that are not known are added to one that replaces others")
        added = {part for mask in terms.masks for part in mask.parts}
        unknown = tuple(part for part in terms.order if part in terms.unknown or part in added)
        return WithoutKeys(unknown=unknown, hard=terms.hard, fills=terms.fills, dtype=terms.dtype_of(unknown))
    mask = terms.masks[0]
    dtype = terms.dtype_of(mask.parts)
    biases = terms.biases_on(mask)
    if len(terms.masks) == 1 and not terms.hard and not any(comes_from_trained_input(bias.node) for bias in biases):
        if mask.is_put and (absorbs(mask.fill, dtype) or not biases):
            return WithoutKeys(average=True)
        is_alone = {*terms.order} == {*mask.parts, *mask.covered}
        is_simple = not has_softcap or (is_alone and all(part.is_one_for_all_heads for part in mask.parts))
        if not mask.is_put and is_simple and absorbs(mask.fill, _dtype_of_kept(mask.parts[0], dtype)):
            return WithoutKeys()
    if not all(part.is_one_for_all_heads for part in terms.order if part not in terms.biases):
        raise NotKnown(mask.parts[0].node, "heads have masks of their own")
    if len(terms.masks) == 1:
        seconds: tuple[Second, ...] = (_of_one(mask, terms, q),)
    else:
        seconds = _of_two(terms, q, k)
    return WithoutKeys(seconds=seconds, fills=terms.fills)


def _terms(
    parts: Sequence[BiasTerm],
    replaced: Mapping[BiasTerm, float],
    readings: Mapping[BiasTerm, Reading | None],
    reader: Reader,
    indices: Indices,
    applied: Mapping[BiasTerm, Applied],
) -> _Terms:
    parts = [part for part in parts if not _is_zero(part, readings[part])]
    put: dict[float, list[BiasTerm]] = {}
    in_bias: dict[fx.Node, list[BiasTerm]] = {}
    masks: list[_Mask] = []
    hard, biases, unknown = [], [], []
    for part in parts:
        reading = readings[part]
        if replaced.get(part, -math.inf) != -math.inf:
            put.setdefault(replaced[part], []).append(part)
        elif part.put is not None:
            in_bias.setdefault(part.put, []).append(part)
        elif part.role is not Role.ADD or (reading is not None and reading.fills == {-math.inf}):
            hard.append(part)
        elif reading is not None and len(reading.fills) == 1:
            masks.append(_Mask((part,), next(iter(reading.fills)), is_put=False))
        elif _excludes_nothing(part, reading, reader, indices):
            biases.append(part)
        else:
            unknown.append(part)
    for holding in in_bias.values():
        covered = tuple(part for part in holding[0].covered if not _is_zero(part, readings.get(part)))
        if any(parts.count(part) > 1 for part in covered):
            raise NotKnown(holding[0].node, "a bias is added inside of a mask and outside")
        masks.append(_Mask(tuple(holding), holding[0].fill, is_put=False, covered=covered))
    masks += (_Mask(tuple(holding), fill, is_put=True) for fill, holding in put.items())
    return _Terms(tuple(parts), readings, tuple(masks), tuple(hard), tuple(biases), tuple(unknown), applied)


def _of_one(mask: _Mask, terms: _Terms, q: fx.Node) -> Second:
    """Rows without keys average those that are not excluded for good."""
    after = tuple(part for part in terms.hard if not mask.is_put or terms.are_after([part], mask))
    if after == terms.hard:
        return _second(mask, terms.hard, terms, q)
    if len(mask.parts) > 1:
        raise NotKnown(mask.parts[0].node, "several masks that replace scores undo others")
    return _second(mask, (*after, flipped(mask.parts[0])), terms, q)  # what was excluded before has no key of it


def _of_two(terms: _Terms, q: fx.Node, k: fx.Node) -> tuple[Second, ...]:
    """Rows that see a key under each of two masks, but none under both.

    Keys that both exclude have the sum of two fills, so much less than one that it weighs nothing. Among those that one
    excludes the larger fill wins; equal fills weigh the same.
    """
    if any(mask.covered for mask in terms.masks):
        raise NotKnown(terms.masks[0].parts[0].node, "of two masks one replaces a bias")
    outer, inner, *more = sorted(terms.masks, key=lambda mask: min(map(terms.order.index, mask.parts)))
    node = outer.parts[0].node
    if more or (outer.is_put and inner.is_put):
        raise NotKnown(node, "it averages the keys that fewest of its masks exclude")
    put = [mask for mask in (outer, inner) if mask.is_put]
    if put and not terms.are_after(terms.hard if outer.is_put else [*terms.hard, *outer.parts], put[0]):
        raise NotKnown(node, "a mask that replaces scores undoes others")
    kept = {outer: inner.parts, inner: outer.parts}  # what is left of the keys that only this mask excludes
    if outer.is_put:  # all that it excludes is excluded by nothing else then
        if len(outer.parts) > 1:
            raise NotKnown(node, "several masks that replace scores undo others")
        kept[outer] = (flipped(outer.parts[0]),)
    if outer.fill == inner.fill:
        winners = [outer, inner]
    elif abs(outer.fill - inner.fill) >= -EXCLUDES:
        winners = [max(outer, inner, key=lambda mask: mask.fill)]
    else:
        raise NotKnown(node, "two fills differ by no more than scores may")
    leaves = [terms.condition((*kept[mask], *terms.hard)) for mask in winners]
    if not (outer.is_put and len(winners) == 2) and not any(_has_keys(c, q, k) for c in leaves):
        raise NotKnown(node, "some row may have no key under one of its masks alone")
    if len(winners) == 2 and not outer.is_put:  # keys that one leaves only where the other does are none of such a row
        both = _clauses(terms.condition([*outer.parts, *inner.parts]))
        winners = [mask for mask in winners if both is None or both != _clauses(terms.condition(kept[mask]))]
    return tuple(_second(mask, (*kept[mask], *terms.hard), terms, q) for mask in winners)


def _second(mask: _Mask, kept: tuple[BiasTerm, ...], terms: _Terms, q: fx.Node) -> Second:
    """The keys that `kept` leaves, of which `mask` excludes all."""
    biases = terms.biases_on(mask)
    if mask.is_put and not biases:
        return Second(kept, are_scores=False)
    number, dtype = mask.fill, terms.dtype_of(mask.parts)
    adds_in = torch.promote_types(q.meta["val"].dtype, torch.float32)
    if torch.finfo(dtype).eps > torch.finfo(adds_in).eps:
        if not absorbs(number, dtype):
            raise NotKnown(mask.parts[0].node, f"{dtype} rounds the scores that its fill is added to, but keeps some")
        return Second((*kept, *biases), are_scores=not mask.is_put, rounded_by=LOWEST)
    at = terms.applied[mask.parts[0]].at
    is_lost = absorbs(number, dtype)  # nothing is left of any sum, so what was rounded before does not matter
    rounded = () if is_lost else tuple(bias for bias in biases if terms.applied[bias].at is at)
    return Second((*kept, *biases), not mask.is_put, number, rounded)


def _dtype_of_kept(part: BiasTerm, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which recognize-mask finds that the number of a mask absorbs scores."""
    return torch.promote_types(torch.promote_types(part.dtype, dtype), torch.float32)


def _clauses(condition: Boolean | None) -> list[Boolean] | None:
    return None if condition is None else clauses(condition)


def _has_keys(condition: Boolean | None, q: fx.Node, k: fx.Node) -> bool:
    return condition is not None and every_row_has_a_key(condition, sizes_of(q)[2], sizes_of(k)[2])


def reader_of(q: fx.Node, k: fx.Node) -> tuple[Reader, Indices]:
    """A reader of masks of this attention, and the indices of batch, head, query and key."""
    space = IndexSpace()
    sizes = (*sizes_of(q)[:3], sizes_of(k)[2])
    indices = tuple(space.add(symbol.name, size) for symbol, size in zip((B, H, Q, K), sizes, strict=True))
    return Reader(space), indices


def reading_of(part: BiasTerm, reader: Reader, indices: Indices) -> Reading | None:
    """What the part means; None where it has no symbolic form."""
    try:
        return read_part(part, reader, indices)
    except Unreadable:
        return None


def _every_row_has_a_key(terms: _Terms, q: fx.Node, k: fx.Node) -> bool:
    """Whether every row provably has a key that no part excludes."""
    return _has_keys(terms.condition([part for part in terms.order if part not in terms.biases]), q, k)


def _is_zero(part: BiasTerm, reading: Reading | None) -> bool:
    """Whether it adds 0 throughout, as the zeros do that a mask of numbers is put into."""
    return part.role is Role.ADD and reading is not None and not reading.fills


def _excludes_nothing(part: BiasTerm, reading: Reading | None, reader: Reader, indices: Indices) -> bool:
    if reading is not None:
        return False
    if is_finite(part.node):
        return True
    try:
        read_linear(part.node, reader, indices)
    except Unreadable:
        return False
    return True
