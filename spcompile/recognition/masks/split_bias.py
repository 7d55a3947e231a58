"""A dense bias, taken apart: which of its terms are structure that a mask can say, and what stays dense and why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx
from sympy.core.symbol import Str
from sympy.logic.boolalg import Boolean

from spcompile.recognition.masks.alibi import Linear, read_linear, slopes_of, sum_of
from spcompile.recognition.masks.bias_terms import BiasTerm, Reading, Role, read_part
from spcompile.recognition.masks.finite import is_finite
from spcompile.recognition.masks.index_maps import Indices
from spcompile.recognition.masks.match import Structure, Unmatched, clauses, every_row_has_a_key, match
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.rows_without_keys import absorbs
from spcompile.recognition.masks.values import Element, Int, Unreadable


@dataclass(frozen=True)
class SplitBias:
    """What is now structure, what stays dense and why, and what became slopes."""

    structure: Structure
    taken: tuple[BiasTerm, ...]
    dense: tuple[tuple[BiasTerm, str, fx.Node], ...]  # (part, why, the node to point at)
    slopes: dict[fx.Node | None, float]
    is_uniform: bool  # whether rows without keys average all values


def split_bias(
    parts: list[BiasTerm], reader: Reader, indices: Indices, sizes: tuple[Int, ...], traits: tuple[bool, bool]
) -> SplitBias:
    """Read as many of the terms as one mask and slopes can say.

    indices, sizes: of batch, head, query and key. traits: whether the attention has sinks, and a softcap.
    """
    has_sinks, has_softcap = traits
    readings: dict[BiasTerm, Reading] = {}
    linear: dict[BiasTerm, Linear] = {}
    dense: list[tuple[BiasTerm, str, fx.Node]] = []
    for part in parts:
        try:
            readings[part] = read_part(part, reader, indices)
        except Unreadable as stop:
            stopped_at = stop.node or part.node
            try:
                linear[part] = read_linear(part.node, reader, indices)
            except Unreadable:
                dense.append((part, f"{_name_of_part(stopped_at)} has no symbolic form", stopped_at))
    where: fx.Node | None
    while True:
        total = sympy.And(*(reading.condition for reading in readings.values()))
        try:
            structure = match(total, reader)
        except Unmatched as stop:
            refused = [p for p, r in readings.items() if stop.clause in clauses(r.condition)] or list(readings)
            why, where = _explain(stop.clause, reader)
        else:
            refused = [p for p, r in readings.items() if r.finite]
            others_exclude_none = all(p.role is Role.ADD and is_finite(p.node) for p, _, _ in dense)
            has_keys = has_sinks or (others_exclude_none and every_row_has_a_key(total, sizes[2], sizes[3]))
            is_uniform = bool(refused) and not has_keys
            is_alone = not dense and not linear and not structure.mask.documents
            can_average = others_exclude_none and (is_alone or not has_softcap) and _is_one_fill(readings, parts)
            if not is_uniform or can_average:
                mask = structure.mask
                is_causal = mask.causal and mask.offset <= 0 and mask.prefix is None
                slopes = slopes_of(sum_of(linear[p] for p in parts if p in linear), is_causal, has_sinks)
                if slopes is None:
                    dense += [
                        (p, "it is no slope times the distance of positions", p.node) for p in parts if p in linear
                    ]
                    linear, slopes = {}, {}
                return SplitBias(structure, (*readings, *linear), tuple(dense), slopes, is_uniform)
            why, where = "its fill is finite and some row may have no key", None
        for part in refused:
            del readings[part]
            dense += [(part, why, where or part.node)] * parts.count(part)


def _is_one_fill(readings: dict[BiasTerm, Reading], parts: list[BiasTerm]) -> bool:
    """Whether all keys that are not seen get one number, which absorbs any score."""
    masks = [part for part in parts if part in readings and readings[part].fills]
    if not masks:
        return False
    first = masks[0]
    is_one = len(masks) == 1 or (first.put is not None and all(part.put is first.put for part in masks))
    if not is_one or len(readings[first].fills) != 1:
        return False
    (fill,) = readings[first].fills
    return fill != -math.inf and absorbs(fill, torch.promote_types(first.dtype, torch.float32))


def _explain(clause: Boolean, reader: Reader) -> tuple[str, fx.Node | None]:
    for element in sorted(clause.atoms(Element), key=str):
        stopped_at = reader.stopped_at[element.node_name]
        return f"{_name_of_part(stopped_at)} has no symbolic form that fits {_without_names(clause)}", stopped_at
    return f"{_without_names(clause)} is none of the known forms", None


def _name_of_part(node: fx.Node) -> str:
    return "a buffer" if node.op == "placeholder" and node.meta.get("state") else str(node.target)


def _without_names(clause: Boolean) -> str:
    """The clause with data called x, y, as it is in each layer."""
    names = dict.fromkeys(element.args[0] for element in sorted(clause.atoms(Element), key=str))
    return str(clause.subs({name: Str(letter) for name, letter in zip(names, _letters(), strict=False)}))


def _letters() -> Iterator[str]:
    yield from "xyz"
    yield from (f"x{i}" for i in itertools.count())
