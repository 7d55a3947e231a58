"""An attention and that of its rows without keys become one, where the mask tells which rows these are."""

from __future__ import annotations

import math
import operator
from dataclasses import replace as with_fields
from typing import Any

import torch
import torch.fx as fx

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.attention.scores.mask import AttentionMask
from spcompile.graph.edit import replace
from spcompile.graph.sizes import same
from spcompile.graph.splice import splice
from spcompile.recognition.attention_nodes import OF_ROWS_WITHOUT_KEYS
from spcompile.recognition.masks.rows_without_keys import open_rows_as_documents, open_rows_of_dense

aten = torch.ops.aten
Shared = dict[tuple[Any, ...], tuple[fx.Node, ...]]


def join_rows_without_keys(graph: fx.Graph) -> int:
    """Write out + rows, of two attentions, as one whose mask has a fill; returns how many.

    Both must do the same to scores. The mask must have no documents: rows without keys are found from positions and
    key padding, or from a dense mask alone. What such rows see is all keys, so masks that exclude keys for good beside
    the fill keep both.
    """
    shared: Shared = {}
    pairs = [pair for node in AttentionCall.all_in(graph) if (pair := _pair_of(node)) is not None]
    for first, rows, total in pairs:
        _join(first, rows, total, shared)
    return len(pairs)


def _pair_of(rows: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(the attention, that of its rows without keys, the sum of both) if `rows` is such a one and can be joined."""
    users = list(rows.users)
    if OF_ROWS_WITHOUT_KEYS not in rows.meta.get("custom", {}) or len(users) != 1:
        return None
    (total, *more) = users[0].users
    if users[0].args[1] != 0 or more or total.target is not aten.add.Tensor:
        return None
    out: Any = total.args[0]
    if out.target is not operator.getitem or out.args[1] != 0 or not AttentionCall.is_call(out.args[0]):
        return None
    one, other = AttentionCall.of(out.args[0]), AttentionCall.of(rows)
    number = other.attention_mask.rounded_by
    is_for_all_keys = other.attention_mask == AttentionMask(documents=True, rounded_by=number)
    is_plain = not one.attention_mask.documents and one.attention_mask.rounded_by is None and one.sinks is None
    if number is None or not is_for_all_keys or not is_plain:
        return None
    if not _do_the_same(one, other) and _dense_mask_beside(one, other) is None:
        return None
    return out.args[0], rows, total


def _do_the_same(one: AttentionCall, other: AttentionCall) -> bool:
    """Whether all but the masks is equal, node by node or as calls on equal operands."""
    names = ("q", "k", "v", "bias", "scale", "alibi_slopes", "softcap", "dropout_seed", "dropout_p")
    return _are_alike_in(names, one, other)


def _dense_mask_beside(one: AttentionCall, other: AttentionCall) -> fx.Node | None:
    """The bool mask, the same for all heads, that alone tells the bias of `one` from that of `other`."""
    names = ("q", "k", "v", "scale", "alibi_slopes", "softcap", "dropout_seed", "dropout_p")
    bias: Any = one.bias
    if bias is None or one.mask != "full" or not _are_alike_in(names, one, other):
        return None
    keep = bias
    if bias.target is aten.where.ScalarOther and bias.args[2] == -math.inf and _are_alike(bias.args[1], other.bias):
        keep = bias.args[0]
    elif other.bias is not None:
        return None
    value = keep.meta["val"]
    return keep if value.dtype == torch.bool and value.ndim == 4 and same(value.shape[1], 1) else None


def _are_alike_in(names: tuple[str, ...], one: AttentionCall, other: AttentionCall) -> bool:
    return all(_are_alike(getattr(one, name), getattr(other, name)) for name in names)


def _are_alike(x: Any, y: Any) -> bool:
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        if isinstance(x, list | tuple) and isinstance(y, list | tuple):
            return len(x) == len(y) and all(map(_are_alike, x, y))
        return type(x) is type(y) and bool(x == y)
    if x is y:
        return True
    if x.op != "call_function" or x.target is not y.target or _is_random(x):
        return False
    return (
        _are_alike(x.args, y.args)
        and x.kwargs.keys() == y.kwargs.keys()
        and all(_are_alike(x.kwargs[name], y.kwargs[name]) for name in x.kwargs)
    )


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _join(first: fx.Node, rows: fx.Node, total: fx.Node, shared: Shared) -> None:
    one = AttentionCall.of(first)
    mask, number = one.attention_mask, AttentionCall.of(rows).attention_mask.rounded_by
    joined = with_fields(mask, documents=True, key_padding=False, fill=number)
    keep = _dense_mask_beside(one, AttentionCall.of(rows))
    if keep is not None:
        bias = one.bias.args[1] if keep is not one.bias else None
        bias, q_documents, k_documents = _of_dense(keep, bias, one, first, shared)
        one = one.but(bias=bias)
    else:
        q_documents, k_documents = _of_structure(one, first, shared)
    one.but(mask=str(joined), q_documents=q_documents, k_documents=k_documents, key_valid=None).write(first)
    replace(total, total.args[0])  # type: ignore[arg-type]


def _of_dense(
    keep: fx.Node, bias: fx.Node | None, one: AttentionCall, first: fx.Node, shared: Shared
) -> tuple[fx.Node, ...]:
    key = (keep, bias)
    if key not in shared:
        shared[key] = splice(open_rows_of_dense, (keep, bias, one.q, one.k), like=first)
    return shared[key]


def _of_structure(one: AttentionCall, first: fx.Node, shared: Shared) -> tuple[fx.Node, ...]:
    key = (one.mask, one.key_valid, *(str(x.meta["val"].shape[2]) for x in (one.q, one.k)))
    if key not in shared:
        shared[key] = splice(open_rows_as_documents, (one.mask, one.key_valid, one.q, one.k), like=first)
    return shared[key]
