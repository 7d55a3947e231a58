"""Attention written out: softmax(q @ k^T * scale + bias, masked) @ v, found around a softmax node.

Downwards from the softmax: casts, views, dropout and the cut behind sinks lead to the product with the values.
Upwards: the maximum of a row (which softmax does not see), sinks as one more column, factors, biases, masks, a softcap,
casts and views lead to the product of queries and keys. Anything else on the way is a refusal with its reason: such an
attention stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import argument, operand, shape_of
from spcompile.graph.einsum import letters_of
from spcompile.recognition.masks.finite import is_finite
from spcompile.recognition.masks.index_maps import sizes_of
from spcompile.recognition.scores_chain import (
    CASTS,
    VIEWS,
    EagerAttention,
    Product,
    Refused,
    keeps_last_two,
    peel,
    product_below,
    product_of,
    without_maximum,
)

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten.special_softmax.default)


class NotAttention(Exception):
    """No product of the softmax with values follows: this softmax is something else."""


@dataclass
class _Weights:
    """What lies between the softmax and the product with the values.

    sinks_last: whether the last column is cut or, False, the first; None for neither. zeroed: a mask where weights are
    set to 0.
    """

    product: Product
    refusal: Refused | None = None
    sinks_last: bool | None = None
    dropout: float = 0.0
    zeroed: Any = None


def match_eager(softmax: fx.Node) -> EagerAttention:
    """The attention around this softmax.

    Raises:
        NotAttention: it is none.
        Refused: it is one, in a form that is not known.
    """
    weights = _product_with_values(softmax)
    rank = len(shape_of(softmax))
    dim = argument(softmax, 1, "dim")
    if weights.refusal is not None:
        raise weights.refusal
    if not isinstance(dim, int) or dim % rank != rank - 1:
        raise Refused("the softmax is not over the keys", softmax)
    if rank > 4:
        raise Refused("scores in five dims that are no groups of heads", softmax)
    logits, sinks = _without_sinks(without_maximum(softmax.args[0]), weights.sinks_last)
    logits = without_maximum(logits) if sinks is None else logits
    found = EagerAttention(softmax, logits, product_below(logits), weights.product)
    found.sinks, found.dropout = sinks, weights.dropout
    peel(logits, 1.0, softmax.meta["val"].dtype, found)
    if weights.zeroed is not None:
        _exclude_for_good(weights.zeroed, found)
    return found


def _exclude_for_good(mask: fx.Node, found: EagerAttention) -> None:
    """Take a mask that weights are set to 0 by: its scores have been replaced before, and rows of these alone are 0."""
    others = [term for term in found.terms if not (term.node is mask and term.masked and term.fill is not None)]
    if len(others) == len(found.terms) or not all(term.fill is None and is_finite(term.node) for term in others):
        raise Refused("attention weights are masked where scores are not", found.result.node)
    found.terms = [term if term in others else replace(term, fill=-math.inf) for term in found.terms]


def rows_of_scores(softmax: fx.Node) -> int | None:
    """The dim of the query rows, from the end, of a softmax over products of queries and keys; None if it is none."""
    below: Any = without_maximum(softmax.args[0])
    while True:
        try:
            product = product_below(below)
            break
        except Refused as stop:
            below = _unmixed_heads(stop.node)
            if below is None:
                return None
    if product.equation is None:
        return -2
    left, right, scores = product.equation
    rows = [dim for dim, letter in enumerate(scores) if letter in left and letter not in right]
    if len(rows) > 1:  # heads too, where all of them read the same keys: as many rows as keys are the rows
        rows = [dim for dim in rows if sizes_of(product.node)[dim] == sizes_of(product.node)[-1]]
    return rows[0] - len(scores) if len(rows) == 1 else None


def _unmixed_heads(node: fx.Node) -> fx.Node | None:
    """The operand of a call that mixes heads, rows and keys of which come last in it and in its result."""
    if node.target is aten.einsum.default:
        operands: Any = node.args[1]
        letters, output = letters_of(str(node.args[0]), [len(shape_of(x)) for x in operands])
        last = output[-2:]
        mixed = [x for x, own in zip(operands, letters, strict=True) if own[-2:] == last]
        others = {letter for own in letters if own[-2:] != last for letter in own}
        return mixed[0] if len(mixed) == 1 and others.isdisjoint(last) else None
    if node.target is aten.conv2d.default:
        is_product = set(shape_of(operand(node, 1))[2:]) == {1} and shape_of(node) == shape_of(operand(node, 0))
        return operand(node, 0) if is_product else None
    return None


def _product_with_values(softmax: fx.Node) -> _Weights:
    """The product with the values, and what is on the way to it."""
    node = softmax
    found = _Weights(Product(softmax, softmax, softmax))
    while True:
        if len(node.users) != 1:
            for user in node.users:
                product = product_of(user)
                if product is not None and product.left is node:
                    refusal = Refused("the attention weights are read by something else too", node)
                    return _Weights(product, refusal)
            raise NotAttention
        (user,) = node.users
        product = product_of(user)
        if product is not None:
            if product.left is not node:
                raise NotAttention
            found.product = product
            return found
        if user.target is aten.dropout.default:
            p = argument(user, 1, "p")
            if p != 0 and argument(user, 2, "train") is not False:
                if found.dropout or p >= 1:
                    found.refusal = Refused("dropout of attention weights twice, or of all", user)
                found.dropout = float(p)
        elif (
            user.target is aten.slice.Tensor
            and found.sinks_last is None
            and (drops_last := _drops_last_column(user)) is not None
        ):
            found.sinks_last = drops_last
        elif user.target is aten.masked_fill.Scalar and user.args[0] is node and user.args[2] == 0:
            if found.zeroed is not None or found.dropout:
                found.refusal = Refused("attention weights are masked twice, or behind dropout", user)
            found.zeroed = user.args[1]
        elif user.target is aten.slice.Tensor:
            found.refusal = Refused("attention weights are cut", user)
        elif not passes_weights(user) and not (user.target in VIEWS and keeps_last_two(user)):
            raise NotAttention
        node = user


def passes_weights(node: fx.Node) -> bool:
    """Whether this call may stand between the softmax and the product with the values, and keeps all dims.

    So may nan_to_num: the weights of a row without keys are NaN there, where masked scores are -inf, and 0 here.
    """
    if node.target is aten.nan_to_num.default:
        return not argument(node, 1, "nan")
    return node.target in CASTS or node.target is aten.dropout.default


def _drops_last_column(node: fx.Node) -> bool | None:
    """Whether this slice drops the last (True) or the first (False) column; None if it does anything else."""
    source: Any = node.args[0]
    rank, size = len(shape_of(source)), sizes_of(source)[-1]
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if argument(node, 1, "dim", 0) % rank != rank - 1 or step != 1 or sizes_of(node)[-1] != size - 1:
        return None
    return {0: True, 1: False}.get(start) if isinstance(start, int) else None


def _without_sinks(node: fx.Node, sinks_last: bool | None) -> tuple[fx.Node, fx.Node | None]:
    """The scores and the column that was joined to them, where one is cut from the weights."""
    if sinks_last is None:
        return node, None
    while node.target in CASTS and node.meta["val"].dtype.is_floating_point:
        node = node.args[0]  # type: ignore[assignment]
    parts: Any = node.args[0] if node.target is aten.cat.default else ()
    rank = len(shape_of(node))
    if len(parts) != 2 or argument(node, 1, "dim", 0) % rank != rank - 1:
        raise Refused("attention weights are cut, but no column of sinks was joined to the scores", node)
    scores, sinks = parts if sinks_last else reversed(parts)
    if sizes_of(sinks)[-1] != 1:
        raise Refused("attention weights are cut elsewhere than the sinks were joined", node)
    return scores, sinks
