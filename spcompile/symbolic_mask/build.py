"""Makes the nodes of a recognised attention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

import spcompile.attention.op  # noqa: F401  (defines spx::attention)
from spcompile.attention.mask import AttentionMask
from spcompile.graph import call, operand, shape_of
from spcompile.rows_without_keys import ABSORBS, marked_as_documents, of_both
from spcompile.splice import splice
from spcompile.symbolic_mask.fills import Mask, WithoutKeys
from spcompile.symbolic_mask.heads import before_repeat
from spcompile.symbolic_mask.parts import Part, Role, full_bias, join

aten = torch.ops.aten
ABSORBED = str(AttentionMask(documents=True, absorbed=True))  # of the attention of rows without keys


@dataclass(frozen=True)
class More:
    """What else happens to the scores and weights; sinks [N]."""

    softcap: float = 0.0
    sinks: fx.Node | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Builder:
    """Makes nodes in front of `at`, with its origin, and collects them in `made`."""

    at: fx.Node
    made: list[fx.Node]

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
        args: tuple[Any, ...] = (q, k, v, *(None,) * 5, full_bias(bias, q, k, self), str(mask), scale)
        if more != More():
            seed = self._seed(q) if more.dropout else None
            args = (*args, None, more.sinks, seed, more.softcap, more.dropout)
        both = self(torch.ops.spx.attention.default, *args)
        return self(operator.getitem, both, 0)

    def condition(self, masks: Iterable[Mask]) -> fx.Node | None:
        """Bool: the keys that all of these masks leave. A number that was added excludes a key if it absorbs scores."""
        parts = [part for mask in masks for part in mask]
        return join([_kept(part, self) for part in parts], self)

    def with_rows_of_one_mask(self, out: fx.Node, without: WithoutKeys) -> fx.Node:
        """The output of an attention under `without.masks`, with the rows that see no key under all of them."""
        both = operand(out, 0)
        (q, k, v), scale, more = (operand(both, i) for i in range(3)), both.args[10], both.args[11:]
        lse = self(operator.getitem, both, 1)
        documents = splice(marked_as_documents, (lse, q, k), like=self.at)
        results: list[fx.Node] = []
        for mask, has_gradient in without.averaged:
            queries, keys = (x if has_gradient else self(aten.detach.default, x) for x in (q, k))
            bias = full_bias(self.condition([mask]), q, k, self)
            args = (queries, keys, v, None, None, *documents, None, bias, ABSORBED, scale)
            rows = self(torch.ops.spx.attention.default, *args, *((None, None, *more[2:]) if more else ()))
            results += (self(operator.getitem, rows, place) for place in (0, 1))
        mean = splice(of_both, tuple(results), like=self.at) if len(results) == 4 else results[0]
        return self(aten.add.Tensor, out, mean)

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


def _kept(part: Part, new: Builder) -> Part:
    return part if part.role is not Role.ADD else Part(new(aten.gt.Scalar, part.node, ABSORBS), Role.KEEP)
