"""A condition over (b, q, k) as an AttentionMask, with the ids and validity vectors that it needs.

The condition is a conjunction of clauses. Each clause must be one of

    q - k + c >= 0             k is at most c ahead of q       causal, or the right side of a window
    k - q + c >= 0             k is at most c behind q         window
    q - k + c >= 0 or k < p    the same with a visible prefix
    floor(q/c) == floor(k/c)   chunk
    f(b, q) == f(b, k)         documents, for any f
    anything over (b, k)       key padding

Packed positions. Let D = cumsum(N) with N[t] true wherever P[t] - P[t-1] != 1 (t >= 1). D never falls, so D[q] == D[k]
means that N is false at every step between q and k, hence P[q] - P[k] == q - k. A comparison of P[q] with P[k] that
stands beside D[q] == D[k] is therefore the same comparison of q with k. `packed_positions` proves the shape of N from
the graph, by reading its element at t = u + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from spcompile.attention.scores.mask import AttentionMask
from spcompile.graph.edit import argument
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.values import (
    Element,
    Int,
    Select,
    Unreadable,
    at_least_zero,
    index_symbol,
    negate,
    substitute,
    to_condition,
)

B, H, Q, K = (index_symbol(name) for name in "bhqk")
_LARGEST_CNF = 6  # literals of a disjunction of conjunctions; beyond, the normal form explodes


class Unmatched(Exception):
    """This clause of a mask is none that AttentionMask knows."""

    def __init__(self, clause: Boolean) -> None:
        super().__init__(str(clause))
        self.clause = clause


@dataclass(frozen=True)
class Structure:
    """A mask that needs no dense tensor.

    document_ids: expressions over (B, K); two positions see each other where all of them agree.
    key_valid: a condition over (B, K).
    """

    mask: AttentionMask
    document_ids: tuple[Int, ...] = ()
    key_valid: Boolean = sympy.true


def match(condition: Boolean, reader: Reader) -> Structure:
    """The structure that means exactly `condition`.

    Raises:
        Unmatched: there is none.
    """
    positional: list[Boolean] = []
    document_ids: list[Int] = []
    key_valid: list[Boolean] = []
    chunk: int | None = None
    for clause in clauses(condition):
        used = clause.free_symbols & {B, H, Q, K}
        document_id = _document_id(clause)
        if H in used or K not in used:
            raise Unmatched(clause)
        if Q not in used:
            key_valid.append(clause)
        elif document_id is None:
            positional.append(clause)
        elif chunk is None and (size := _chunk_size(document_id)) is not None:
            chunk = size
        elif document_id not in document_ids:
            document_ids.append(document_id)
    packed = [p for document_id in document_ids for p in packed_positions(document_id, reader)]
    ahead, behind, prefixes = _bounds(positional, packed)
    mask = _mask(ahead, behind, prefixes, chunk, bool(document_ids), bool(key_valid))
    return Structure(mask, tuple(document_ids), sympy.And(*key_valid))


def every_row_has_a_key(condition: Boolean, queries: Int, keys: Int) -> bool:
    """Whether each query provably sees some key: its own position, or the first."""
    own_exists = bool((keys - queries).is_nonnegative)
    return (own_exists and substitute(condition, {K: Q}) == sympy.true) or (
        substitute(condition, {K: sympy.Integer(0)}) == sympy.true
    )


def clauses(condition: Boolean) -> list[Boolean]:
    """The conjuncts of the condition, each a literal or a disjunction of literals, without what others imply."""
    found: list[Boolean] = []
    for part in sympy.And.make_args(condition):
        literals = sum(len(arg.args) if isinstance(arg, sympy.And) else 1 for arg in part.args)
        if isinstance(part, sympy.Or) and part.has(sympy.And) and literals <= _LARGEST_CNF:
            part = sympy.And(*filter(_is_no_tautology, sympy.And.make_args(sympy.to_cnf(part))))
        found += (clause for clause in sympy.And.make_args(part) if clause != sympy.true)
    found = [sympy.Or(*_weakest(sympy.Or.make_args(clause))) for clause in found]
    facts = [clause for clause in found if not isinstance(clause, sympy.Or)]
    found = facts + [known for clause in found if isinstance(clause, sympy.Or) for known in _beside(clause, facts)]
    return sorted(dict.fromkeys(found), key=sympy.default_sort_key)


def _weakest(literals: tuple[Boolean, ...]) -> list[Boolean]:
    """The literals of a disjunction that imply no other one of it: e >= 0 implies e + 1 >= 0."""
    return [a for a in literals if not any(a is not b and _slack(a, b, -1) >= 0 for b in literals)]


def _beside(clause: Boolean, facts: list[Boolean]) -> list[Boolean]:
    """What a disjunction says where these literals hold: nothing if they imply it, and less what they contradict."""
    literals = sympy.Or.make_args(clause)
    if any(_slack(fact, literal, -1) >= 0 for fact in facts for literal in literals):
        return []
    return [sympy.Or(*(a for a in literals if not any(_slack(fact, a, 1) < 0 for fact in facts)))]


def _slack(a: Boolean, b: Boolean, sign: int) -> float:
    """The constant f + sign * e of two literals e >= 0 and f >= 0; NaN, which compares to nothing, if it is none."""
    if not (isinstance(a, sympy.Ge) and isinstance(b, sympy.Ge)):
        return math.nan
    difference = sympy.expand(b.lhs + sign * a.lhs)
    return float(difference) if difference.is_number else math.nan


def _is_no_tautology(clause: Boolean) -> bool:
    literals = sympy.Or.make_args(clause)
    return not any(negate(literal) in literals for literal in literals)


def packed_positions(document_id: Int, reader: Reader) -> Iterator[Int]:
    """The P[b, k] that grow by exactly 1 from each position to the next of the same document."""
    if not isinstance(document_id, Element):
        return
    node = reader.leaves[document_id.node_name]
    if node.target is not torch.ops.aten.cumsum.default:
        return
    dim = argument(node, 1, "dim") % len(document_id.indices)
    others = [i for d, i in enumerate(document_id.indices) if d != dim]
    if document_id.indices[dim] != K or any(i.has(K) for i in others):
        return
    u = reader.fresh_index()
    source: Any = node.args[0]
    try:
        summand = reader.element(source, (*document_id.indices[:dim], u + 1, *document_id.indices[dim + 1 :]))
    except Unreadable:
        return
    if isinstance(summand, Select):
        if (summand.then, summand.other) not in ((1, 0), (0, 1)):
            return
    elif source.meta["val"].dtype != torch.bool:
        return
    for literal in sympy.Or.make_args(to_condition(summand)):
        if isinstance(literal, sympy.Ne):
            for position in literal.lhs.atoms(Element):
                gap = position - position.subs(u, u - 1) - 1
                if sympy.expand(literal.lhs - gap) == 0 or sympy.expand(literal.lhs + gap) == 0:
                    yield position.subs(u, K - 1)


def _document_id(clause: Boolean) -> Int | None:
    """f(b, k) of the clause f(b, q) == f(b, k)."""
    if not isinstance(clause, sympy.Eq):
        return None
    terms = sympy.Add.make_args(clause.lhs)
    of_k = sympy.Add(*(term for term in terms if term.has(K) and not term.has(Q)))
    of_q = sympy.Add(*(term for term in terms if term.has(Q) and not term.has(K)))
    if of_k == 0 or sympy.expand(of_k + of_q - clause.lhs) != 0 or sympy.expand(of_q.subs(Q, K) + of_k) != 0:
        return None
    return -of_k if of_k.could_extract_minus_sign() else of_k


def _chunk_size(document_id: Int) -> int | None:
    if not isinstance(document_id, sympy.floor):
        return None
    ratio = document_id.args[0] / K
    return int(1 / ratio) if ratio.is_Rational and (1 / ratio).is_Integer else None


def _with_indices(literal: Boolean, packed: Iterable[Int]) -> Boolean:
    """The literal with differences of packed positions replaced by differences of indices."""
    if not isinstance(literal, sympy.Ge):
        return literal
    e = literal.lhs
    for position in packed:
        at_k, at_q = e.coeff(position), e.coeff(position.subs(K, Q))
        if at_q != 0 and at_k == -at_q:
            e = sympy.expand(e + at_q * (Q - K - position.subs(K, Q) + position))
    return at_least_zero(e)


def _distance(literal: Boolean) -> tuple[int, int] | None:
    """(sign, c) of sign * (q - k) + c >= 0."""
    if not isinstance(literal, sympy.Ge):
        return None
    sign = literal.lhs.coeff(Q)
    c = sympy.expand(literal.lhs - sign * (Q - K))
    return (int(sign), int(c)) if sign in (1, -1) and c.is_Integer else None


def _prefix(literals: tuple[Boolean, ...]) -> tuple[int, int] | None:
    """(c, p) of the clause: q - k + c >= 0, or k < p."""
    distances = [d for d in map(_distance, literals) if d is not None]
    ends = [e.lhs + K + 1 for e in literals if isinstance(e, sympy.Ge) and (e.lhs + K).is_Integer]
    if len(literals) != 2 or len(distances) != 1 or len(ends) != 1 or distances[0][0] != 1:
        return None
    return distances[0][1], int(ends[0])


def _bounds(
    positional: list[Boolean], packed: list[Int]
) -> tuple[int | None, int | None, list[tuple[int, int, Boolean]]]:
    ahead: list[int] = []
    behind: list[int] = []
    prefixes: list[tuple[int, int, Boolean]] = []
    for clause in positional:
        literals = tuple(_with_indices(literal, packed) for literal in sympy.Or.make_args(clause))
        distance = _distance(literals[0]) if len(literals) == 1 else None
        prefix = _prefix(literals)
        if sympy.true in literals:
            continue
        if distance is not None:
            if distance[0] == -1 and distance[1] < 0:
                raise Unmatched(clause)
            (ahead if distance[0] == 1 else behind).append(distance[1])
        elif prefix is not None:
            prefixes.append((*prefix, clause))
        else:
            raise Unmatched(clause)
    return min(ahead, default=None), min(behind, default=None), prefixes


def _mask(
    ahead: int | None,
    behind: int | None,
    prefixes: list[tuple[int, int, Boolean]],
    chunk: int | None,
    documents: bool,
    key_padding: bool,
) -> AttentionMask:
    prefixes = [p for p in prefixes if ahead is None or ahead > p[0]]  # the others are implied
    window = behind + 1 if behind is not None else None
    more: dict[str, Any] = {"window": window, "chunk": chunk, "documents": documents, "key_padding": key_padding}
    if prefixes:
        offset, prefix, clause = prefixes[0]
        if len(prefixes) > 1 or (ahead is not None and ahead < 0):
            raise Unmatched(clause)
        right = ahead + 1 if ahead is not None else None
        return AttentionMask(causal=True, offset=offset, prefix=prefix, window_right=right, **more)
    if ahead is None:
        return AttentionMask(**more)
    if ahead > 0 and behind is not None:
        return AttentionMask(window_right=ahead + 1, **more)
    return AttentionMask(causal=True, offset=ahead, **more)
