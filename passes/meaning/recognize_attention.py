"""recognize-attention: attention in any of its spellings becomes one spx.attention node.

scaled_dot_product_attention, and softmax(q @ k^T * scale + bias, masked) @ v written out with matmul, bmm, baddbmm or
einsum, with a softcap, sinks and dropout where it has them. Keys and values that the model repeated to the query heads
are taken before the repeat. A dense mask becomes the `bias` (bool: True keeps); recognize-mask reads it.

Dropout of attention weights. Which weights the plain model drops, it draws for the whole [B, N, S, T] matrix, which a
long sequence never builds. Here they follow from one seed for each sequence and head and from positions: they are the
same on any number of ranks, one among them, but not those that the plain model would have drawn (SPR303).

Rows without any key. scaled_dot_product_attention with a bool mask or -inf gives zeros and zero gradients there (torch
2.13), as spx.attention does. The written-out form with -inf gives NaN; here the row becomes zero. With a *finite* fill
such a row is uniform over all keys: where some row may have no key, one mask that replaces scores (masked_fill with
finfo.min) is taken, and the mean of all values put into those rows. Otherwise they get an attention of their own, two
masks one for each; one added mask is left to recognize-mask where it can do that. What is no such case is refused.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.capture.flex_attention import refuse
from spcompile.graph.edit import argument, erase_dead, operand, replace, shape_of
from spcompile.graph.splice import splice
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.attention_nodes import Builder, More, Rest
from spcompile.recognition.eager import SOFTMAX, NotAttention, match_eager, rows_of_scores
from spcompile.recognition.grouped_heads import write_grouped_heads_in_four_dims
from spcompile.recognition.masks.bias_terms import Applied, BiasTerm, Role, parts_of
from spcompile.recognition.masks.bits import filled
from spcompile.recognition.masks.fills import NotKnown, WithoutKeys, rows_without_keys
from spcompile.recognition.masks.index_maps import sizes_of
from spcompile.recognition.masks.rows_without_keys import with_uniform_rows
from spcompile.recognition.repeated_heads import before_repeat, by_head, heads_in_batch
from spcompile.recognition.scores_chain import EagerAttention, Product, Refused, Term
from spcompile.sharding.sequences import SCORES, UNREAD_ATTENTION

aten = torch.ops.aten


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    """Every attention becomes spx.attention.

    written_out: leave those that are written out as they are, with scores that are held whole: to compare with programs
        that hold them.
    """

    written_out: bool = False

    name: ClassVar[str] = "recognize-attention"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-softmax"})
    summary: ClassVar[str] = "SDPA and written-out attention become spx.attention, repeated heads are undone"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every attention that can be taken."""
        rewrites = write_grouped_heads_in_four_dims(gm.graph)
        shared: dict[Any, Any] = {}
        for node in list(gm.graph.nodes):
            made: list[fx.Node] = []
            try:
                if node.target is aten.scaled_dot_product_attention.default:
                    _rewrite_sdpa(node, Builder(node, made, shared), ctx)
                elif node.target in SOFTMAX:
                    found = match_eager(node)
                    if self.written_out:
                        raise Refused("option written_out leaves it as it is", node)
                    _rewrite_eager(found, Builder(found.result.node, made, shared), ctx)
                else:
                    continue
                _remark_dropout(made, ctx)
            except (Refused, NotAttention) as stop:
                for useless in reversed(made):
                    gm.graph.erase_node(useless)
                if isinstance(stop, Refused):
                    refuse(node, stop.reason)
                    ctx.remarks.add("SPR202", f"attention: {stop.reason}", stop.node, value=node.name)
                if node.target in SOFTMAX:
                    rows = rows_of_scores(node)
                    mark = {UNREAD_ATTENTION: rows or -2} if isinstance(stop, Refused) else {SCORES: rows}
                    node.meta["custom"] = {**node.meta.get("custom", {}), **mark}
            else:
                rewrites += 1
        if rewrites:
            erase_dead(gm)
        return rewrites


def _remark_dropout(made: list[fx.Node], ctx: Context) -> None:
    for node in made:
        if AttentionCall.is_call(node) and AttentionCall.of(node).has_dropout:
            text = "dropout of attention weights follows from seeds and positions; the plain model draws other numbers"
            ctx.remarks.add("SPR303", text, node, strict_error=False)


def _rewrite_sdpa(node: fx.Node, new: Builder, ctx: Context) -> None:
    q, k, v, mask = (argument(node, i, name) for i, name in enumerate(("query", "key", "value", "attn_mask")))
    dropout = float(argument(node, 4, "dropout_p", 0.0))
    if dropout >= 1:
        raise Refused("dropout of all attention weights", node)
    scale = _scale(argument(node, 6, "scale"), q, node)
    rank = len(shape_of(q))
    if rank < 3 or len(shape_of(k)) != rank or len(shape_of(v)) != rank:
        raise Refused("queries, keys and values that are not all of one rank, 3 or more", node)
    batches = list(shape_of(q)[: rank - 3])
    if rank > 4:
        q, k, v, mask = _one_batch(node, [q, k, v], mask, new)
    if sizes_of(q)[0] != sizes_of(k)[0] or sizes_of(q)[0] != sizes_of(v)[0]:
        raise Refused("queries, keys and values of different batch sizes", node)
    if rank == 3:
        q, k, v = (new(aten.unsqueeze.default, x, 1) for x in (q, k, v))
        if mask is not None and len(shape_of(mask)) == 3:
            mask = new(aten.unsqueeze.default, mask, 1)
    heads = sizes_of(q)[1]
    if not all(h.is_Integer and heads.is_Integer and heads % h == 0 for h in (sizes_of(k)[1], sizes_of(v)[1])):
        raise Refused("a number of query heads that is no multiple of the key heads", node)
    if mask is not None and shape_of(mask)[:-2] and len(shape_of(mask)) > 4:
        raise Refused("a mask of rank above 4", node)
    rest: list[Rest] = []
    if mask is not None:
        dtype = torch.promote_types(q.meta["val"].dtype, torch.float32)
        parts = parts_of(mask)
        without = _rows_without_keys(parts, {}, q, k, dict.fromkeys(parts, Applied(mask, dtype)), More(), ctx)
        if without.seconds or without.unknown:
            mask, rest = new.bias(parts, without, q, k)
    is_causal = AttentionMask(causal=bool(argument(node, 5, "is_causal", False)))
    out = new.attention(q, k, v, mask, is_causal, scale, More(dropout=dropout))
    out = new.with_rest(out, rest) if rest else out
    if rank != 4:
        out = new(aten.squeeze.dim, out, 1) if rank == 3 else new(aten.unflatten.int, out, 0, batches)
    replace(node, out)


def _one_batch(node: fx.Node, qkv: list[fx.Node], mask: fx.Node | None, new: Builder) -> list[fx.Node | None]:
    """Operands [*batches, N, S, H] with one batch dim, and the mask, which is one for all batches or has them too."""
    batches = shape_of(qkv[0])[:-3]
    if any(shape_of(x)[:-3] != batches for x in qkv) or not all(isinstance(size, int) for size in batches):
        raise Refused("batches that are not equal, or symbols", node)
    flat: list[fx.Node | None] = [new(aten.flatten.using_ints, x, 0, len(batches) - 1) for x in qkv]
    if mask is not None and len(shape_of(mask)) > 3:
        if shape_of(mask)[:-3] != batches:
            raise Refused("a mask that some batches share", node)
        mask = new(aten.flatten.using_ints, mask, 0, len(batches) - 1)
    return [*flat, mask]


def _scale(scale: Any, q: fx.Node, node: fx.Node) -> float:
    head_size = shape_of(q)[-1]
    if scale is None and isinstance(head_size, int):
        return 1.0 / math.sqrt(head_size)
    if not isinstance(scale, int | float):
        raise Refused("a scale that is not a number", node)
    return float(scale)


def _rewrite_eager(found: EagerAttention, new: Builder, ctx: Context) -> None:
    q, k, v, unfold = _operands(found, new)
    heads = sizes_of(q)[1]
    if sizes_of(q)[0] != sizes_of(k)[0] or sizes_of(q)[0] != sizes_of(v)[0]:
        raise Refused("queries, keys and values of different batch sizes", found.scores.node)
    if not all(h.is_Integer and heads.is_Integer and heads % h == 0 for h in (sizes_of(k)[1], sizes_of(v)[1])):
        raise Refused("a number of query heads that is no multiple of the key heads", found.scores.node)
    _check_layout(found, q, k, v)
    parts, replaced, applied = _parts(found, unfold, new)
    try:
        parts, replaced = filled(parts, replaced, q, k)
    except NotKnown as stop:
        raise Refused(stop.why, stop.node) from None
    without = _rows_without_keys(parts, replaced, q, k, applied, More(found.softcap, found.sinks), ctx)
    bias, rest = new.bias(parts, without, q, k)
    q, k, v = _one_dtype(q, k, v, new)
    sinks = None if found.sinks is None else _sinks(found.sinks, q, new)
    out = new.attention(q, k, v, bias, AttentionMask(), found.scale, More(found.softcap, sinks, found.dropout))
    if without.average:
        out = _averaged(out, found, new)
    out = new.with_rest(out, rest) if rest else out
    dtype = found.result.node.meta["val"].dtype
    if out.meta["val"].dtype != dtype:
        out = new(aten.to.dtype, out, dtype)
    if len(shape_of(found.result.node)) == 3:
        out = new(aten.flatten.using_ints, out, 0, 1)
    if found.result.equation is not None:
        weights, values, result = found.result.equation
        (last,) = set(values) - set(weights)
        out = _permuted(out, weights[:-1] + last, result, new)
    replace(found.result.node, out)


def _averaged(out: fx.Node, found: EagerAttention, new: Builder) -> fx.Node:
    """The output with the mean of all values in rows without keys: their scores were replaced by a finite number."""
    both = operand(out, 0)
    call = AttentionCall.of(both)
    lse = new(operator.getitem, both, 1)
    args = (out, lse, call.q, call.k, call.v, found.scale, False)
    return splice(with_uniform_rows, args, like=found.result.node)


def _operands(found: EagerAttention, new: Builder) -> tuple[fx.Node, fx.Node, fx.Node, int]:
    """Queries [B, N, S, H], keys [B, G, T, H], values [B, G, T, V]; and N of scores that are [B * N, S, T], else 0."""
    if found.scores.equation is not None:
        q, k = _einsum_queries_keys(found.scores, new)
    else:
        q, k = found.scores.left, new(aten.transpose.int, found.scores.right, -1, -2)
    q = _times_factors(q, found, new)
    v = found.result.right if found.result.equation is None else _einsum_values(found.result, new)
    heads = 0
    if 3 in (len(shape_of(q)), len(shape_of(v))):
        candidates = [heads_in_batch(x) for x in (q, k, v) if len(shape_of(x)) == 3]
        whole = [shape_of(x)[1] for x in (q, k, v) if len(shape_of(x)) == 4]
        heads = max([*candidates, *whole])
        if any(sizes_of(x)[0].is_Integer and sizes_of(x)[0] % heads for x in (q, k, v) if len(shape_of(x)) == 3):
            raise Refused("heads that are folded into the batch in different ways", found.scores.node)
        q, k, v = (new(aten.unflatten.int, x, 0, [-1, heads]) if len(shape_of(x)) == 3 else x for x in (q, k, v))
    return before_repeat(q, repeats_allowed=False), before_repeat(k), v, heads


def _times_factors(q: fx.Node, found: EagerAttention, new: Builder) -> fx.Node:
    """The queries times what the scores are multiplied with, which is one number for each row or fewer."""
    dtype = q.meta["val"].dtype
    for factor, divides in found.factors:
        q = new(aten.div.Tensor if divides else aten.mul.Tensor, q, factor)
    return q if q.meta["val"].dtype == dtype else new(aten.to.dtype, q, dtype)


def _check_layout(found: EagerAttention, q: fx.Node, k: fx.Node, v: fx.Node) -> None:
    """Refuse scores that are broadcast, or folded in another way than [B * N, S, T], anywhere on the way."""
    B, N, S, _ = sizes_of(q)
    T = sizes_of(k)[2]
    legal = {3: (sympy.expand(B * N), S, T), 4: (B, N, S, T)}
    for node in (found.scores.node, found.logits, *(term.at for term in found.terms)):
        sizes = sizes_of(node)
        if sizes != legal[len(sizes)] or sizes_of(v)[2] != T:
            raise Refused("scores of another shape than queries times keys", node)


def _sinks(column: fx.Node, q: fx.Node, new: Builder) -> fx.Node:
    """The sinks [N] behind the column [B, N, S, 1] of the scores."""
    found = by_head(column, sizes_of(q)[1])
    if found is None:
        raise Refused("sinks that are not one number for each head", column)
    return found if len(shape_of(found)) == 1 else new(aten.reshape.default, found, [-1])


def _einsum_queries_keys(product: Product, new: Builder) -> tuple[fx.Node, fx.Node]:
    assert product.equation is not None
    left, right, scores = product.equation
    head = (set(left) & set(right)) - set(scores)
    row, key = scores[-2], scores[-1]
    if len(head) != 1 or key not in right or key in left or row not in left or row in right:
        raise Refused("an einsum that is not queries times keys", product.node)
    (h,) = head
    _, *middle, keys = sizes_of(product.node)
    if len(middle) == 2 and scores[1] not in right and middle[0] == keys != middle[1]:
        raise Refused(
            "an einsum of heads that share a key, behind the query rows", product.node
        )  # rows are as many as keys
    q = _permuted(product.left, left, scores[:-1] + h, new)
    right_node, right = _with_head(product.right, right, scores, new)
    return q, _permuted(right_node, right, scores[:-2] + key + h, new)


def _einsum_values(product: Product, new: Builder) -> fx.Node:
    assert product.equation is not None
    weights, values, result = product.equation
    last = set(values) - set(weights)
    right, values = _with_head(product.right, values, weights, new)
    keys = weights[:-2] + weights[-1]
    if len(last) != 1 or set(values) != {*keys, *last} or set(result) != {*weights[:-1], *last}:
        raise Refused("an einsum that is not weights times values", product.node)
    return _permuted(right, values, keys + last.pop(), new)


def _with_head(node: fx.Node, letters: str, scores: str, new: Builder) -> tuple[fx.Node, str]:
    """Keys or values of an einsum, and their dims: those that all heads share get a head of their own."""
    if len(scores) != 4 or scores[1] in letters:
        return node, letters
    return new(aten.unsqueeze.default, node, 0), scores[1] + letters


def _permuted(node: fx.Node, letters: str, order: str, new: Builder) -> fx.Node:
    if set(letters) != set(order):
        raise Refused(f"an einsum of dims {letters} where {order} is needed", node)
    return node if letters == order else new(aten.permute.default, node, [letters.index(x) for x in order])


def _one_dtype(q: fx.Node, k: fx.Node, v: fx.Node, new: Builder) -> tuple[fx.Node, fx.Node, fx.Node]:
    dtypes = [x.meta["val"].dtype for x in (q, k, v)]
    widest = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    return tuple(x if x.meta["val"].dtype == widest else new(aten.to.dtype, x, widest) for x in (q, k, v))  # type: ignore[return-value]


def _parts(
    found: EagerAttention, heads: int, new: Builder
) -> tuple[list[BiasTerm], dict[BiasTerm, float], dict[BiasTerm, Applied]]:
    """The terms of the bias, the last one applied first, what scores became where a mask replaced them, and how each is
    applied.
    """
    parts: list[BiasTerm] = []
    replaced = {}
    applied: dict[BiasTerm, Applied] = {}
    for term in found.terms:
        node = _unfolded(term, heads, found, new)
        if term.fill is None:
            if term.factor != 1.0:
                node = new(aten.mul.Tensor, node, term.factor)
            parts += parts_of(node, Role.ADD)
        else:
            if node.meta["val"].dtype != torch.bool:
                node = new(aten.to.dtype, node, torch.bool)
            parts.append(BiasTerm(node, Role.DROP if term.masked else Role.KEEP))
            replaced[parts[-1]] = term.fill * term.factor
        applied |= {part: Applied(term.at, term.dtype) for part in parts if part not in applied}
    return parts, replaced, applied


def _rows_without_keys(
    parts: list[BiasTerm],
    replaced: dict[BiasTerm, float],
    q: fx.Node,
    k: fx.Node,
    applied: dict[BiasTerm, Applied],
    more: More,
    ctx: Context,
) -> WithoutKeys:
    try:
        without = rows_without_keys(parts, replaced, q, k, applied, more.sinks is not None, more.softcap != 0)
    except NotKnown as stop:
        text = f"masked scores get a finite fill and some row may have no key: {stop.why}"
        raise Refused(text, stop.node) from None
    for part in without.of_bits:
        text = "a mask excludes keys where its integers are 0; others than 0 and 1 would mean something else"
        ctx.remarks.add("SPR207", text, part.node, strict_error=False)
    return without


def _unfolded(term: Term, heads: int, found: EagerAttention, new: Builder) -> fx.Node:
    """The bias or mask of scores [B * N, S, T] as one of [B, N, S, T]."""
    node = term.node
    if len(shape_of(node)) != 3:
        return node
    if heads == 0 or sizes_of(node)[0] == 1:
        return new(aten.unsqueeze.default, node, 0)
    if sizes_of(node)[0] != sizes_of(found.scores.node)[0]:
        raise Refused("a bias of another rank than the scores", node)
    return new(aten.unflatten.int, node, 0, [-1, heads])


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, G, T, _ = k.shape
    k, v = (x[:, :, None].expand(B, G, q.shape[1] // G, T, -1).reshape(B, q.shape[1], T, -1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    S, T = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    keep = torch.ones(S, T, dtype=torch.bool, device=q.device).tril()
    return torch.softmax(scores.masked_fill(~keep, -math.inf), dim=-1) @ v


def _example_qkv(heads: int, key_heads: int) -> tuple[Tensor, ...]:
    shapes = ((2, heads, 12, 4), (2, key_heads, 12, 4), (2, key_heads, 12, 4))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


EXAMPLES = (Example(_grouped, lambda: _example_qkv(4, 2)), Example(_written_out, lambda: _example_qkv(4, 4)))
EXAMPLE = EXAMPLES[0]
