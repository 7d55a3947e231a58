"""recognize-mask: dense attention masks are read back as causal, window, chunk, documents, key padding, prefix.

A model that builds its mask by index arithmetic holds a [B, 1, S, T] tensor; at 128k positions that is 16 GiB a row.
This pass reads one element of it as a formula over (b, q, k) and writes the formula as the attention's `mask` and a few
vectors. ALiBi, a slope for each head times the distance of key and query, becomes the slopes. Terms that cannot be read
stay in a smaller dense bias.

Rows without any key: scaled_dot_product_attention gives zeros there for bool masks and for -inf (checked with torch
2.13, all dtypes, math and flash kernels, forward and gradients), and so does spx.attention. A *finite* fill such as
finfo.min gives such rows the mean of all values instead. Where every row provably has a key, the filled keys get
weight exp(-1e8) = 0 either way; elsewhere the mean is put into those rows
(`spcompile/recognition/masks/rows_without_keys.py`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.capture.flex_attention import refuse
from spcompile.graph.edit import call, erase_dead, replace, shape_of
from spcompile.graph.splice import splice
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.attention_nodes import AVERAGED, MADE, OF_ROWS_WITHOUT_KEYS
from spcompile.recognition.masks.alibi import write_slopes
from spcompile.recognition.masks.bias_terms import BiasTerm, Role, full_bias, joined_terms, parts_of
from spcompile.recognition.masks.finite import is_finite
from spcompile.recognition.masks.index_maps import IndexSpace, sizes_of
from spcompile.recognition.masks.match import B, H, K, Q, Structure
from spcompile.recognition.masks.reader import Reader
from spcompile.recognition.masks.rows_without_keys import (
    LOWEST,
    as_documents,
    both_documents,
    marked_as_documents,
    rows_of_one_number,
    with_uniform_rows,
)
from spcompile.recognition.masks.split_bias import SplitBias, split_bias
from spcompile.recognition.masks.vectors import Unwritable, VectorWriter
from spcompile.recognition.one_attention import join_rows_without_keys

aten = torch.ops.aten

_ABSORBED = str(AttentionMask(documents=True, rounded_by=LOWEST))


@dataclass(frozen=True)
class _Operands:
    """New arguments of an attention."""

    mask: str
    q_documents: fx.Node | None
    k_documents: fx.Node | None
    key_valid: fx.Node | None
    bias: fx.Node | None
    slopes: fx.Node | None
    is_uniform: bool

    def put_into(self, attention: AttentionCall) -> AttentionCall:
        """The attention with these arguments."""
        return attention.but(
            mask=self.mask,
            q_documents=self.q_documents,
            k_documents=self.k_documents,
            key_valid=self.key_valid,
            bias=self.bias,
            alibi_slopes=self.slopes if self.slopes is not None else attention.alibi_slopes,
        )


@dataclass(frozen=True)
class RecognizeMask(Pass):
    """Masks built by index arithmetic become AttentionMask; dense tensors disappear."""

    name: ClassVar[str] = "recognize-mask"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-attention"})
    summary: ClassVar[str] = "reads dense masks back as causal, window, chunk, documents, key padding, prefix"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every attention whose bias holds a mask."""
        done: dict[tuple[Any, ...], _Operands | None] = {}
        rewrites = 0
        for node in AttentionCall.all_in(gm.graph):
            attention = AttentionCall.of(node)
            if attention.bias is None or not (attention.mask == "full" or _is_of_rows_without_keys(node)):
                continue
            lengths = [sizes_of(x)[d] for x in (attention.q, attention.k) for d in (0, 2)]
            key = (attention.bias, attention.mask, attention.q_documents, *_traits(attention), *lengths)
            if key not in done:
                done[key] = _recognize(node, ctx)
            new = done[key]
            if new is not None:
                new.put_into(attention).write(node)
                if new.is_uniform:
                    _average_rows_without_keys(node)
                rewrites += 1
        rewrites += _average_rows_of_one_number(gm.graph) + join_rows_without_keys(gm.graph)
        if rewrites:
            erase_dead(gm)
        return rewrites


def _traits(attention: AttentionCall) -> tuple[bool, bool]:
    """Whether the attention has sinks, and a softcap."""
    return attention.sinks is not None, attention.has_softcap


def _average_rows_without_keys(node: fx.Node, marks: fx.Node | None = None) -> None:
    """marks: -inf in these rows, [B, N, S]; by default the log-sum-exp."""
    attention = AttentionCall.of(node)
    if attention.has_softcap:
        return _add_rows_without_keys(node, marks)
    (out,) = (user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
    before = call(node.graph, operator.getitem, (node, 0), like=out)
    marks = marks or call(node.graph, operator.getitem, (node, 1), like=out)
    args = (before, marks, attention.q, attention.k, attention.v, attention.scale, True)
    replace(out, splice(with_uniform_rows, args, like=out))


def _add_rows_without_keys(node: fx.Node, marks: fx.Node | None) -> None:
    """Under a softcap: by a second attention, of these rows alone."""
    (out,) = (user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
    first = AttentionCall.of(node)
    if marks is None:
        documents = splice(as_documents, (first.mask, first.key_valid, first.q, first.k), like=out)
    else:
        documents = splice(marked_as_documents, (marks, first.q, first.k), like=out)
    of_rows = first.but(
        q_documents=documents[0],
        k_documents=documents[1],
        key_valid=None,
        bias=None,
        mask=_ABSORBED,
        alibi_slopes=None,
        sinks=None,
    )
    second = of_rows.insert(like=node, before=out)
    node.meta["custom"] = {**node.meta.get("custom", {}), AVERAGED: True}
    second.meta["custom"] = {**second.meta.get("custom", {}), OF_ROWS_WITHOUT_KEYS: True}
    of_these = call(node.graph, operator.getitem, (second, 0), like=out)
    before = call(node.graph, operator.getitem, (node, 0), like=out)
    replace(out, call(node.graph, aten.add.Tensor, (before, of_these), like=out))


def _average_rows_of_one_number(graph: fx.Graph) -> int:
    """Average all values where a dense bias of unknown numbers has a row of one large negative number, as min is.

    So does the plain model. The gradient of such a row is that of the formula. What scaled_dot_product_attention gives
    comes of a log-sum-exp that has lost the number of keys.
    """
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    rewrites = 0
    for node in AttentionCall.all_in(graph):
        attention, custom = AttentionCall.of(node), node.meta.get("custom", {})
        bias, (has_sinks, has_softcap) = attention.bias, _traits(attention)
        if bias is None or attention.mask != "full" or has_sinks or AVERAGED in custom:
            continue
        if has_softcap and sizes_of(bias)[1] != 1:
            continue
        if not bias.meta["val"].dtype.is_floating_point or _has_no_fill(bias):
            continue
        if bias not in found:
            found[bias] = splice(rows_of_one_number, (bias,), like=node)
        attention.but(bias=found[bias][0]).write(node)
        node.meta["custom"] = {**custom, AVERAGED: True}
        _average_rows_without_keys(node, found[bias][1])
        rewrites += 1
    return rewrites


def _has_no_fill(bias: fx.Node) -> bool:
    """Whether no number of the bias is a finite one that stands for a masked key."""
    parts = parts_of(bias)
    return all(part.put is None and (part.role is not Role.ADD or is_finite(part.node)) for part in parts)


def _recognize(node: fx.Node, ctx: Context) -> _Operands | None:
    attention = AttentionCall.of(node)
    q, k, bias = attention.q, attention.k, attention.bias
    if _is_mutated(bias):
        ctx.remarks.add("SPR201", "the mask is written to in place", bias)
        return None
    space = IndexSpace()
    sizes = (sizes_of(q)[0], sizes_of(q)[1], sizes_of(q)[2], sizes_of(k)[2])
    indices = tuple(space.add(symbol.name, size) for symbol, size in zip((B, H, Q, K), sizes, strict=True))
    reader = Reader(space)
    split = split_bias(parts_of(bias), reader, indices, sizes, _traits(attention))
    new = _write(split, reader, node) if split.taken else None
    is_users = not _is_of_rows_without_keys(node)
    for part, why, where in split.dense if is_users and (new is not None or not split.taken) else ():
        if part.role is Role.ADD or MADE not in part.node.meta.get("custom", {}):
            _remark(ctx, part, why, where)
    if split.taken and new is None:
        ctx.remarks.add("SPR201", f"no vector of the graph holds what {split.structure.mask} needs", bias)
    return new


def _remark(ctx: Context, part: BiasTerm, why: str, where: fx.Node) -> None:
    shape = [1, 1, *shape_of(part.node)][-2:]
    is_square = all(size != 1 for size in shape)
    what = "bias" if part.role is Role.ADD else "mask"
    at = where if "stack_trace" in where.meta else part.node
    if what == "mask":
        refuse(part.node, f"mask_mod: {why}")
    ctx.remarks.add("SPR201", f"{what}: {why}", at, value=part.node.name, strict_error=is_square)


def _write(split: SplitBias, reader: Reader, node: fx.Node) -> _Operands | None:
    attention = AttentionCall.of(node)
    q, k, bias = attention.q, attention.k, attention.bias
    made: list[fx.Node] = []

    def new(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        made.append(
            call(node.graph, target, args, kwargs, like=bias if bias.op == "call_function" else node, before=node)
        )
        return made[-1]

    try:
        key_valid, q_documents, k_documents = _vectors(split.structure, reader, q, k, new)
        slopes = write_slopes(split.slopes, q, new)
    except Unwritable:
        for useless in reversed(made):
            node.graph.erase_node(useless)
        return None
    rest = joined_terms([part for part, _, _ in split.dense], new)
    bias_left = full_bias(rest, q, k, new)
    mask = split.structure.mask
    if _is_of_rows_without_keys(node):
        of_rows = attention.q_documents, attention.k_documents
        if q_documents is None or k_documents is None:
            q_documents, k_documents = of_rows
        else:
            q_documents, k_documents = splice(both_documents, (q_documents, k_documents, *of_rows), like=node)
        mask = dataclasses.replace(mask, documents=True, rounded_by=attention.attention_mask.rounded_by)
    return _Operands(str(mask), q_documents, k_documents, key_valid, bias_left, slopes, split.is_uniform)


def _is_of_rows_without_keys(node: fx.Node) -> bool:
    return OF_ROWS_WITHOUT_KEYS in node.meta.get("custom", {})


def _vectors(
    structure: Structure, reader: Reader, q: fx.Node, k: fx.Node, new: Callable[..., fx.Node]
) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """The key validity and the document ids of queries and keys, each [B or 1, length], where the mask has them."""

    def writer(side: fx.Node) -> VectorWriter:
        value: Tensor = side.meta["val"]
        length: Any = value.shape[2]
        if not isinstance(length, int):
            length = new(aten.sym_size.int, side, 2)
        return VectorWriter(reader.leaves, sizes_of(side)[0], length, value.device, new)

    key_valid = writer(k).condition(structure.key_valid) if structure.mask.key_padding else None
    if not structure.mask.documents:
        return key_valid, None, None
    k_documents = writer(k).document_id(structure.document_ids)
    if sizes_of(q)[2] == sizes_of(k)[2]:
        return key_valid, k_documents, k_documents
    return key_valid, writer(q).document_id(structure.document_ids), k_documents


def _is_mutated(bias: fx.Node) -> bool:
    """Whether a call that writes in place touches the mask or anything it is made of."""
    seen: set[fx.Node] = set()
    pending = [bias]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if any(_writes(user) for user in (node, *node.users)):
                return True
            pending += node.all_input_nodes
    return False


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _packed_window(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    steps = torch.diff(positions, prepend=positions[:, :1] - 1)
    documents = (steps != 1).cumsum(-1)
    p_q, p_k = positions[:, None, :, None], positions[:, None, None, :]
    keep = (p_k <= p_q) & (p_k > p_q - 4) & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def _padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    keep = (torch.arange(k.shape[2], device=q.device) <= rows) & attention_mask.bool()[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def _causal_qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 2, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))


def _packed_positions() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]])


def _right_padding() -> Tensor:
    return (torch.arange(12) < torch.tensor([[12], [7]])).long()


EXAMPLES = (
    Example(_packed_window, lambda: (*_causal_qkv(), _packed_positions())),
    Example(_padded, lambda: (*_causal_qkv(), _right_padding())),
)
EXAMPLE = EXAMPLES[0]
