"""Makes the nodes of a recognised attention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

import spcompile.attention.op  # noqa: F401  (defines spx::attention)
from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.graph.edit import call, operand, shape_of
from spcompile.graph.splice import splice
from spcompile.recognition.masks.bias_terms import BiasTerm, Role, full_bias, hard, joined_terms
from spcompile.recognition.masks.fills import Second, WithoutKeys
from spcompile.recognition.masks.index_maps import sizes_of
from spcompile.recognition.masks.rows_without_keys import (
    LOWEST,
    large_numbers_apart,
    marked_as_documents,
    of_both,
    rounded_by,
    without_large_numbers,
)
from spcompile.recognition.repeated_heads import before_repeat

aten = torch.ops.aten
AVERAGED = "spx_averages_rows_of_one_number"  # marks an attention whose rows without keys are dealt with
OF_ROWS_WITHOUT_KEYS = "spx_rows_without_keys"  # marks an attention whose documents are these rows, and all others


MADE = "spx_made"  # marks what was made of a user's bias: remarks are about that


@dataclass(frozen=True)
class More:
    """What else happens to the scores and weights; sinks [N]."""

    softcap: float = 0.0
    sinks: fx.Node | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Rest:
    """An attention of rows without keys. documents: ids that tell these rows; None: where the first has no key.

    are_scores, rounded_by: as in `Second`.
    """

    bias: fx.Node | None
    are_scores: bool = True
    rounded_by: float | None = None
    documents: tuple[fx.Node, ...] | None = None


@dataclass(frozen=True)
class Builder:
    """Makes nodes in front of `at`, with its origin, and collects them in `made`.

    shared: what attentions in front of `at` have made of the same biases.
    """

    at: fx.Node
    made: list[fx.Node]
    shared: dict[Any, Any]

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = call(self.at.graph, target, args, kwargs, like=self.at)
        self.made.append(node)
        return node

    def attention(
        self,
        q: fx.Node,
        k: fx.Node,
        v: fx.Node,
        bias: fx.Node | None,
        mask: AttentionMask,
        scale: float,
        more: More,
    ) -> fx.Node:
        """The output of one spx.attention on [B, N, S, H], [B, G, T, H], [B, G, T, V]."""
        k, v = before_repeat(k), before_repeat(v)
        k, v = (self._same_heads(x, y) for x, y in ((k, v), (v, k)))
        both = self._insert(
            AttentionCall(
                q=q,
                k=k,
                v=v,
                bias=full_bias(bias, q, k, self),
                mask=str(mask),
                scale=scale,
                sinks=more.sinks,
                dropout_seed=self._seed(q) if more.dropout else None,
                softcap=more.softcap,
                dropout_p=more.dropout,
            )
        )
        return self(operator.getitem, both, 0)

    def bias(
        self, parts: list[BiasTerm], without: WithoutKeys, q: fx.Node, k: fx.Node
    ) -> tuple[fx.Node | None, list[Rest]]:
        """The bias of the attention, and the attentions of its rows without keys."""
        if without.unknown:
            return self._bias_of_unknown(parts, without, q, k)
        if not without.seconds:
            return joined_terms(parts, self), []
        rest = [
            Rest(self._joined(self._rounded(second), without, q, k), second.are_scores, second.rounded_by)
            for second in without.seconds
        ]
        return self._joined(parts, without, q, k), rest

    def with_rest(self, out: fx.Node, rest: list[Rest]) -> fx.Node:
        """The output of an attention with the rows that see no key in it."""
        both = operand(out, 0)
        both.meta["custom"] = {**both.meta.get("custom", {}), AVERAGED: True}
        first = AttentionCall.of(both)
        if any(each.documents is None for each in rest):
            lse = self(operator.getitem, both, 1)
            marked = splice(marked_as_documents, (lse, first.q, first.k), like=self.at)
        results: list[fx.Node] = []
        for each in rest:
            q_documents, k_documents = each.documents or marked
            rows = self._insert(
                first.but(
                    q_documents=q_documents,
                    k_documents=k_documents,
                    bias=each.bias,
                    mask=str(AttentionMask(documents=True, rounded_by=each.rounded_by)),
                    scale=first.scale if each.are_scores else 0.0,
                    sinks=None,
                )
            )
            rows.meta["custom"] = {**rows.meta.get("custom", {}), OF_ROWS_WITHOUT_KEYS: True}
            results += (self(operator.getitem, rows, place) for place in (0, 1))
        total = splice(of_both, tuple(results), like=self.at) if len(results) == 4 else results[0]
        return self(aten.add.Tensor, out, total)

    def _bias_of_unknown(
        self, parts: list[BiasTerm], without: WithoutKeys, q: fx.Node, k: fx.Node
    ) -> tuple[fx.Node | None, list[Rest]]:
        others = [part for part in parts if part not in without.unknown]
        is_for_each_key = all(part.is_one_for_all_rows and part.is_one_for_all_heads for part in without.unknown)
        by_key = is_for_each_key and not all(part.is_one_for_all_rows for part in without.hard)
        key = (*parts, by_key, without.dtype, q.meta["val"].dtype, *sizes_of(q)[:3], sizes_of(k)[2])
        if key not in self.shared:
            numbers = self._joined(without.unknown, WithoutKeys(), q, k)
            whole = self._joined(parts, WithoutKeys(), q, k) if not by_key else None
            dtype = torch.promote_types(without.dtype, torch.float32)
            args = (numbers, dtype) if by_key else (whole, numbers, q, k, dtype)
            self.shared[key] = splice(large_numbers_apart if by_key else without_large_numbers, args, like=self.at)
            _mark_made(self.shared[key], args)
        small, *more = self.shared[key]

        def with_others(numbers: fx.Node) -> fx.Node | None:
            return self._joined([*others, BiasTerm(numbers, Role.ADD)], without, q, k)

        if by_key:
            relative, absorbed = map(with_others, more)
            rest = [Rest(absorbed, rounded_by=LOWEST), Rest(relative)]
        else:
            rest = [Rest(with_others(more[0]), rounded_by=LOWEST, documents=(more[1], more[2]))]
        return with_others(small), rest

    def _joined(self, parts: Sequence[BiasTerm], without: WithoutKeys, q: fx.Node, k: fx.Node) -> fx.Node | None:
        kept = [self._kept(part, without.fills[part]) if part in without.fills else part for part in parts]
        return full_bias(joined_terms(kept, self), q, k, self)

    def _rounded(self, second: Second) -> list[BiasTerm]:
        """The parts of its bias, rounded where the plain model has added them to a large number."""

        def rounded(part: BiasTerm) -> BiasTerm:
            return BiasTerm(splice(rounded_by, (part.node, second.rounded_by), like=self.at), Role.ADD)

        return [rounded(part) if part in second.rounded else part for part in second.parts]

    def _kept(self, part: BiasTerm, fill: float) -> BiasTerm:
        """The condition that is behind an added mask: a number and 0 lie on two sides of half the number."""
        if part.put is not None:
            return hard(part)
        return BiasTerm(self(aten.gt.Scalar, part.node, fill / 2), Role.KEEP)

    def _insert(self, attention: AttentionCall) -> fx.Node:
        self.made.append(attention.insert(like=self.at))
        return self.made[-1]

    def _seed(self, q: fx.Node) -> fx.Node:
        """Random numbers [B, N], drawn once: never in a backward that computes this region again."""
        B, N = (n if isinstance(n, int) else self(aten.sym_size.int, q, d) for d, n in enumerate(shape_of(q)[:2]))
        node = self(aten.randint.low, 0, 2**32, [B, N], device=q.meta["val"].device)
        for key in ("recompute", "ac_graph_id"):
            node.meta.pop(key, None)
        return node

    def _same_heads(self, x: fx.Node, y: fx.Node) -> fx.Node:
        """`x` with as many heads as the larger of `x` and `y` (keys and values that were repeated unequally)."""
        mine, other = shape_of(x)[1], shape_of(y)[1]
        return self(aten.repeat_interleave.self_int, x, other // mine, 1) if mine < other else x


def _mark_made(results: Sequence[fx.Node], given: Sequence[Any]) -> None:
    """Mark what leads from the nodes given to the results."""
    pending, seen = list(results), {node for node in given if isinstance(node, fx.Node)}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            node.meta["custom"] = {**node.meta.get("custom", {}), MADE: True}
            pending += node.all_input_nodes
