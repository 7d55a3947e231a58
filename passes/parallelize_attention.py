"""parallelize-attention: gathered keys and values become a ring or a Ulysses exchange.

Before: attention(q local, all_gather(k), all_gather(v), positions). After, on the same values,
    ring      ring_attention(q, k, v): keys and values travel, one op with the loop inside (Liu et al. 2023)
    ulysses   all_to_all(q, k, v in one message) -> attention over the whole sequence for a part of the heads
              -> all_to_all back (Jacobs et al. 2023), made again in the backward, since saving its result beside its
              operand would be saving it twice
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile import sequence
from spcompile.graph import call, operand
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sizes import hint
from spcompile.splice import splice

spx = torch.ops.spx


@dataclass(frozen=True)
class ParallelizeAttention(Pass):
    """Rewrite every attention whose keys and values are gathered over one axis."""

    name: ClassVar[str] = "parallelize-attention"
    stage: ClassVar[Stage] = Stage.LOCAL
    after: ClassVar[frozenset[str]] = frozenset({"lower"})
    summary: ClassVar[str] = "turns gathered keys and values into ring or Ulysses attention"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite; returns the number of attentions."""
        count = 0
        for node in list(gm.graph.nodes):
            if node.target is not spx.attention.default or node.args[3] is None:
                continue
            if not _is_gathered(node):
                _remark_kept(node, ctx)
                continue
            strategy = node.meta.get("custom", {}).get("spx_attention", "ring")
            (_ulysses if strategy == "ulysses" else _ring)(node)
            count += 1
        gm.graph.eliminate_dead_code()
        gm.recompile()
        return count


def _is_gathered(node: fx.Node) -> bool:
    k, v, positions = node.args[1], node.args[2], node.args[3]
    return (
        all(isinstance(x, fx.Node) and x.target is spx.all_gather.default and x.args[1] == 2 for x in (k, v))
        and isinstance(positions, fx.Node)
        and positions.target is spx.positions.default
    )


def _remark_kept(node: fx.Node, ctx: Context) -> None:
    """The rows of an image are split by its first dim, a beginning by the layout of the whole: no ring's layout."""
    k: Any = node.args[1]
    if hint(k.meta["val"].shape[2]) > 1:
        why = "its rows are a product of dims, or the beginning of a longer one"
        ctx.remarks.add("SPR202", f"keys and values of an attention are gathered: {why}", node)


def _before_gathers(node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[Any, ...]]:
    """The local keys and values behind the gathers, and (query length, key length, axis, degree, order)."""
    gather = operand(node, 1)
    _, _, k_length, axis, degree, order, _ = gather.args
    q_length = operand(node, 3).args[0]
    return operand(gather, 0), operand(operand(node, 2), 0), (q_length, k_length, axis, degree, order)


def _ring(node: fx.Node) -> None:
    q, _, _, _, _, q_documents, k_documents, key_valid, bias, mask, scale, *more = node.args
    k, v, layout = _before_gathers(node)
    args = (q, k, v, q_documents, k_documents, key_valid, bias, mask, scale)
    new = call(node.graph, spx.ring_attention.default, (*args, *layout, *more), like=node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _ulysses(node: fx.Node) -> None:
    q, _, _, _, _, *data = node.args
    k, v, layout = _before_gathers(node)
    data += [None, None, None, 0.0, 0.0][len(data) - 6 :]
    for place in _BY_HEAD:
        x = data[place]
        # Its part of the heads is taken from the value before it varies: then the gradient comes back by a gather.
        if isinstance(x, fx.Node) and x.target is spx.vary.default and hint(x.meta["val"].shape[_BY_HEAD[place]]) > 1:
            data[place] = x.args[0]
    results = splice(ulysses_attention, (q, k, v, *data, *layout), like=node)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


# Arguments of spx.attention with a dim of heads, by place behind the positions: bias, slopes, sinks and seeds.
_BY_HEAD = {3: 1, 6: 0, 7: 0, 8: 1}


def ulysses_attention(
    q_BNsH: Tensor,
    k_BGsH: Tensor,
    v_BGsV: Tensor,
    q_documents: Tensor | None,
    k_documents: Tensor | None,
    key_valid: Tensor | None,
    bias: Tensor | None,
    mask: str,
    scale: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    softcap: float,
    dropout_p: float,
    q_length: Any,
    k_length: Any,
    axis: str,
    degree: int,
    order: str,
) -> tuple[Tensor, Tensor]:
    """Attention with heads split instead of the sequence; s is the local, S the whole length.

    Returns [B, N, s, V] and the log-sum-exp [B, N, s], whose exchange is dropped where nobody reads it.

    One message carries q, k and v. Fewer key/value heads than ranks are repeated up to one a rank, and travel apart:
    the backward exchanges them again, so that they are saved unrepeated. It exchanges the result again, too: of that,
    attention's backward needs what it returned, and the next projection's what came back.
    bias [B|1, N|1, 1, T], slopes [N], sinks [N] and seeds [B, N] are whole on every rank, which takes those of its
    heads.
    """

    def of_heads(x: Tensor | None, dim: int) -> Tensor | None:
        return x if x is None or x.shape[dim] == 1 else spx.shard(x, dim, axis, degree, "contiguous", None)

    if k_BGsH.shape[1] < degree:
        repeats = degree // k_BGsH.shape[1]
        k_BGsH, v_BGsV = k_BGsH.repeat_interleave(repeats, 1), v_BGsV.repeat_interleave(repeats, 1)
        (q_BnSH,) = exchange_for_heads((q_BNsH,), (q_length,), axis, degree, order)
        k_B1SH, v_B1SV = exchange_for_heads((k_BGsH, v_BGsV), (k_length, k_length), axis, degree, order, recompute=True)
        whole = [q_BnSH, k_B1SH, v_B1SV]
    else:
        lengths = (q_length, k_length, k_length)
        whole = exchange_for_heads((q_BNsH, k_BGsH, v_BGsV), lengths, axis, degree, order)
    data = (None, None, q_documents, k_documents, key_valid, of_heads(bias, 1), mask, scale)
    more = (of_heads(alibi_slopes, 0), of_heads(sinks, 0), of_heads(dropout_seed, 1), softcap, dropout_p)
    out_BnSV, lse_BnS = spx.attention(*whole, *data, *more)
    lse_BNs = exchange_for_rows(lse_BnS.unsqueeze(3), axis, degree, order).squeeze(3)
    return exchange_for_rows(out_BnSV, axis, degree, order), lse_BNs


def exchange_for_rows(x_BnSV: Tensor, axis: str, degree: int, order: str) -> Tensor:
    """[B, heads/degree, S, V] -> [B, heads, s, V], in memory as [B, s, heads, V]."""
    parts_RBsnV = sequence.split(x_BnSV.transpose(1, 2), 1, degree, order, fill=None)
    heads_RBsnV = spx.all_to_all(parts_RBsnV.contiguous(), axis, degree, recompute=True)
    return heads_RBsnV.movedim(0, 2).flatten(2, 3).transpose(1, 2)


def exchange_for_heads(
    tensors: tuple[Tensor, ...], lengths: tuple[Any, ...], axis: str, degree: int, order: str, recompute: bool = False
) -> list[Tensor]:
    """[B, heads, s, d] of every tensor -> [B, heads/degree, S, d], in one all-to-all if their s agree."""
    if len({str(x.shape[2]) for x in tensors}) > 1:
        pairs = zip(tensors, lengths, strict=True)
        return [exchange_for_heads((x,), (n,), axis, degree, order, recompute)[0] for x, n in pairs]
    packed = []
    for x in tensors:
        b, heads, s, d = x.shape
        grouped_RBshd = x.reshape(b, degree, heads // degree, s, d).permute(1, 0, 3, 2, 4)
        packed.append(grouped_RBshd.reshape(degree, b, s, heads // degree * d))
    message = packed[0].contiguous() if len(packed) == 1 else torch.cat(packed, -1)
    received_RBsX = spx.all_to_all(message, axis, degree, recompute)
    whole_BSX = sequence.restore(received_RBsX, 1, lengths[0], order)
    result, start = [], 0
    for x in tensors:
        b, heads, _, d = x.shape
        width = heads // degree * d
        part_BSX = whole_BSX.narrow(-1, start, width)
        result.append(part_BSX.reshape(b, lengths[0], heads // degree, d).transpose(1, 2))
        start += width
    return result


def _attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, is_causal=True)


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 4, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))


EXAMPLE = Example(_attention, _inputs, options={"attention": "ring"})
