"""choose-attention: ring, Ulysses or both for every attention, and the order of the sequence that suits them.

"auto" takes what spcompile.attention.strategy_cost predicts to be fastest, from bytes, head counts and the tables of
links and accelerators; the remark says what it predicts of every candidate, forward and backward. It assumes that a
ring's hop hides behind the block of scores before it, all-to-alls behind nothing, that kernels on a ring's blocks reach
3/4 of their speed on whole sequences, and that padded heads cost what others do.

A hybrid has Ulysses among neighbours on the axis, whose link is the fast one, and a ring between groups of them. All
hybrids of a program divide the axis alike, as is best for all its attentions together: so there are two more process
groups at most. Nothing here differs between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.strategy import Strategy
from spcompile.attention.strategy_cost import Cost, Problem, cost
from spcompile.graph.sizes import hint
from spcompile.graph.typed_call import value_of
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.links import link_of
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.attention_nodes import OF_ROWS_WITHOUT_KEYS
from spcompile.sharding.rules.attention import merges_keys
from spcompile.sharding.tensor_parallel import heads_on_a_rank

CLEARLY = 0.95  # of the time of zigzag: with less to gain, equal work is worth more than the prediction


@dataclass(frozen=True)
class ChooseAttention(Pass):
    """Record a strategy on every attention, and the order of the sequence in the context."""

    name: ClassVar[str] = "choose-attention"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-mask"})
    axis: ClassVar[str | None] = "cp"
    summary: ClassVar[str] = "chooses ring, Ulysses or both by predicted time, and the order of the sequence"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Decide; rewrites nothing."""
        degree = ctx.mesh.size("cp")
        attentions = [node for node in AttentionCall.all_in(gm.graph) if not self._merges(node, ctx)]
        hybrid = _hybrid(attentions, degree, ctx)
        on_rings: list[tuple[fx.Node, Strategy]] = []
        for node in attentions:
            strategy, why = choose_strategy(node, degree, hybrid, ctx)
            is_apart = OF_ROWS_WITHOUT_KEYS in node.meta.get("custom", {})
            if is_apart and ctx.options.attention == "auto":
                strategy = Strategy(1, degree)  # where no row is without keys no hop is made
            custom = {"spx_attention": str(strategy), "spx_bias_rows": AttentionCall.of(node).bias_has_rows}
            node.meta["custom"] = {**node.meta.get("custom", {}), **custom}
            if is_apart:
                continue  # nobody wrote it: it takes the order that suits the others
            if _is_asked_for(strategy, ctx.options.attention):
                ctx.remarks.add("SPR203", f"attention runs as {strategy}: {why}", strict_error=False)
            else:
                asked = ctx.options.attention
                ctx.remarks.add("SPR204", f"attention={asked!r} was asked for, {strategy} is used: {why}", node)
            on_rings += [(node, strategy)] if strategy.outer > 1 else []
        ctx.order = _order(on_rings, ctx)
        masks = [AttentionCall.of(node).attention_mask for node, _ in on_rings]
        if any(mask.documents and mask.fill is None for mask in masks):
            why = "documents are data, and are taken as one; hops that they leave empty are skipped when it runs"
            ctx.remarks.add("SPR203", f"rings have the sequence in {ctx.order} order: {why}", strict_error=False)
        return 0

    def _merges(self, node: fx.Node, ctx: Context) -> bool:
        """Whether this attention has queries so few that neither they nor keys travel."""
        call = AttentionCall.of(node)
        if merges := merges_keys(call):
            few = hint(call.sizes.q_rows)
            text = f"queries of an attention, {few}, see on each rank its own keys; results are merged by log-sum-exp"
            ctx.remarks.add("SPR203", text, node, strict_error=False)
        return merges


def choose_strategy(node: fx.Node, degree: int, hybrid: Strategy | None, ctx: Context) -> tuple[Strategy, str]:
    """(strategy, reason) for one attention. hybrid: the one that this program may use."""
    asked = ctx.options.attention
    ring, ulysses = Strategy(1, degree), Strategy(degree, 1)
    call = AttentionCall.of(node)
    if call.bias_has_rows and hint(value_of(call.bias).shape[1]) == 1:
        return ring, "its dense mask is split by query rows, and all heads share it"
    candidates = [ulysses, ring, *([hybrid] if hybrid is not None else [])]
    wish = [s for s in candidates if _is_asked_for(s, asked)]
    if len(wish) == 1:
        return wish[0], "asked for"
    costs = {s: _best_cost(node, s, ctx) for s in (ulysses, ring, *Strategy.hybrids(degree))}
    best = min(candidates, key=lambda s: costs[s].seconds)
    heads, kv_heads = _head_counts(call, ctx)
    numbers = "; ".join(map(str, costs.values()))
    why = f"{heads} heads, {kv_heads} key/value heads, predicted for a rank: {numbers}"
    return best, why if wish else f"cp = {degree} is not a product; {why}"


def _hybrid(attentions: list[fx.Node], degree: int, ctx: Context) -> Strategy | None:
    """The hybrid of this program: the one that was asked for, or the fastest for all attentions together."""
    asked = ctx.options.attention
    if isinstance(asked, Mapping):
        wish = Strategy(asked["ulysses"], asked["ring"])
        return wish if wish in Strategy.hybrids(degree) else None
    if asked not in ("auto", "hybrid"):
        return None
    times = {s: sum(_best_cost(node, s, ctx).seconds for node in attentions) for s in Strategy.hybrids(degree)}
    return min(times, key=lambda s: times[s], default=None)


def _is_asked_for(strategy: Strategy, asked: str | Mapping[str, int]) -> bool:
    if isinstance(asked, Mapping):
        return (strategy.inner, strategy.outer) == (asked["ulysses"], asked["ring"])
    return asked == "auto" or str(strategy).partition(" ")[0] == asked


def _order(rings: Sequence[tuple[fx.Node, Strategy]], ctx: Context) -> str:
    """The order of the sequence that suits these rings together.

    Zigzag gives all ranks of a causal ring equal work; contiguous spares a window the hops that it does not reach.
    """
    causal = any(AttentionCall.of(node).attention_mask.causal for node, _ in rings)
    if not causal or ctx.options.balance != "zigzag" or ctx.options.outputs == "sharded":
        return "contiguous"
    zigzag, contiguous = (sum(_cost(*ring, order, ctx).seconds for ring in rings) for order in ("zigzag", "contiguous"))
    return "contiguous" if contiguous < CLEARLY * zigzag else "zigzag"


def _best_cost(node: fx.Node, strategy: Strategy, ctx: Context) -> Cost:
    """In the order that suits this attention."""
    order = _order([(node, strategy)], ctx) if strategy.outer > 1 else "contiguous"
    return _cost(node, strategy, order, ctx)


def _cost(node: fx.Node, strategy: Strategy, order: str, ctx: Context) -> Cost:
    call = AttentionCall.of(node)
    heads, kv_heads = _head_counts(call, ctx)
    problem = replace(Problem.of(call), heads=heads, kv_heads=kv_heads)
    accelerator = ACCELERATORS[ctx.options.accelerator]
    links = ctx.options.links, accelerator.links
    inner, outer = (link_of(ctx.mesh, "cp", links[0], degree, links[1]) for degree in (strategy.inner, None))
    flops = accelerator.attention_flops(problem.itemsize)
    return cost(problem, strategy, order, inner, outer, flops)


def _head_counts(call: AttentionCall, ctx: Context) -> tuple[int, int]:
    """(query heads, key/value heads) that tp leaves on a rank."""
    sizes = call.sizes.hints()
    return heads_on_a_rank(sizes.heads, sizes.kv_heads, ctx.mesh.size("tp"))


def _grouped_attention(q_BNSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, heads, 7, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))


EXAMPLE = Example(_grouped_attention, _inputs)
