"""Written-out attention whose scores keep groups of query heads in a dim of their own, [B, G, R, S, T], in four dims.

Keys and values [B, G, 1, T, H], or [B, G, T, H] in an einsum, are then repeated for the R heads of a group, as a model
that writes four dims repeats them; whoever finds the attention undoes that. Groups may also stand behind their heads,
[B, R, G, S, T].

B batch, G key heads, R query heads of each, S query rows, T keys, H head size; X, Y the second and third dim: G and R.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import argument, call, is_tensor, replace, shape_of
from spcompile.recognition.eager import SOFTMAX, passes_weights
from spcompile.recognition.scores_chain import Product, product_of, scores_operand, without_maximum

aten = torch.ops.aten


def write_grouped_heads_in_four_dims(graph: fx.Graph) -> int:
    """Rewrite every attention around a softmax in five dims; returns how many. The old calls are left without users."""
    count = 0
    for softmax in list(graph.nodes):
        if softmax.target in SOFTMAX and len(shape_of(softmax)) == 5:
            found = _find(softmax)
            if found is not None:
                _rewrite(found)
                count += 1
    return count


@dataclass(frozen=True)
class _Attention:
    """scores, result: the two products. chain: the calls from behind the scores to in front of the result, in order."""

    scores: Product
    chain: list[tuple[fx.Node, fx.Node]]  # each with the operand that holds the scores or weights
    result: Product


def _find(softmax: fx.Node) -> _Attention | None:
    below: Any = without_maximum(softmax.args[0])
    chain = [(softmax, below)]
    while (scores := product_of(below)) is None:
        node, below = below, scores_operand(below)
        if below is None or shape_of(below) != shape_of(softmax):
            return None
        chain.append((node, below))
    chain.reverse()
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        result = product_of(user)
        if result is not None:
            found = _Attention(scores, chain, result)
            return found if result.left is node and _is_grouped(softmax, found) else None
        if not passes_weights(user) or shape_of(user) != shape_of(softmax):
            return None
        chain.append((user, node))
        node = user
    return None


def _is_grouped(softmax: fx.Node, found: _Attention) -> bool:
    """Whether both products are over one batch and heads in the second and third dim, whose numbers are known."""
    if argument(softmax, 1, "dim") not in (-1, 4) or any(not isinstance(n, int) for n in shape_of(softmax)[1:3]):
        return False
    return _scores_fit(found.scores, shape_of(softmax)) and _result_fits(found.result, shape_of(softmax))


def _scores_fit(product: Product, shape: tuple[Any, ...]) -> bool:
    if product.equation is None:
        return shape_of(product.left)[:3] == shape[:3] and shape_of(product.right)[0] == shape[0]
    left, right, scores = product.equation
    head = set(left) & set(right) - set(scores)
    batch, x, y, row, key = (*scores,)
    return len(head) == 1 and set(left) == {batch, x, y, row, *head} and _fits(right, {batch, key, *head}, {x, y})


def _result_fits(product: Product, shape: tuple[Any, ...]) -> bool:
    if product.equation is None:
        return shape_of(product.right)[0] == shape[0]
    weights, values, result = product.equation
    last = set(values) - set(weights)
    batch, x, y, row, key = (*weights,)
    return len(last) == 1 and set(result) == {batch, x, y, row, *last} and _fits(values, {batch, key, *last}, {x, y})


def _fits(letters: str, needed: set[str], allowed: set[str]) -> bool:
    return needed <= set(letters) <= needed | allowed


def _rewrite(found: _Attention) -> None:
    at = found.scores.node
    q, k = _queries_keys(found.scores)
    heads = _Heads(shape_of(at)[1], shape_of(at)[2], groups_first=shape_of(k)[2] == 1 or shape_of(k)[1] != 1)
    keys = _new(at, aten.transpose.int, heads.repeated(k, at), -1, -2)
    new = {at: _new(at, aten.matmul.default, heads.joined(q, at), keys)}
    for node, below in found.chain:
        if node.target in SOFTMAX:
            new[node] = _new(node, node.target, new[below], -1, *node.args[2:])
        else:
            sides = {n: heads.of_side(n, node) for n in node.all_input_nodes if n is not below and is_tensor(n)}
            new[node] = _on(node, {**sides, below: new[below]})
    at = found.result.node
    out = _new(at, aten.matmul.default, new[found.chain[-1][0]], heads.repeated(_value_operand(found.result), at))
    replace(at, _as_written(heads.apart(out, at), found.result))


@dataclass(frozen=True)
class _Heads:
    """The second and third dim of five, which become one: key heads, then the query heads of each."""

    X: int
    Y: int
    groups_first: bool

    @property
    def sizes(self) -> list[int]:
        """Key heads, query heads of each."""
        return [self.X, self.Y] if self.groups_first else [self.Y, self.X]

    def joined(self, x: fx.Node, at: fx.Node) -> fx.Node:
        """[B, X or 1, Y or 1, .., ..] as [B, N, .., ..]."""
        if shape_of(x)[1:3] != (self.X, self.Y):
            x = _new(at, aten.expand.default, x, [-1, self.X, self.Y, -1, -1])
        x = x if self.groups_first else _new(at, aten.transpose.int, x, 1, 2)
        return _new(at, aten.flatten.using_ints, x, 1, 2)

    def repeated(self, x: fx.Node, at: fx.Node) -> fx.Node:
        """Keys or values [B, X or 1, Y or 1, T, H] as [B, N, T, H], made of [B, G, T, H] where a group shares them."""
        query_heads = 2 if self.groups_first else 1
        if shape_of(x)[query_heads] != 1:
            return self.joined(x, at)
        x_BGTH = _new(at, aten.squeeze.dim, x, query_heads)
        x = _new(at, aten.expand.default, _new(at, aten.unsqueeze.default, x_BGTH, 2), [-1, *self.sizes, -1, -1])
        return _new(at, aten.flatten.using_ints, x, 1, 2)

    def apart(self, x_BNSV: fx.Node, at: fx.Node) -> fx.Node:
        """Back to [B, X, Y, S, V]."""
        x = _new(at, aten.unflatten.int, x_BNSV, 1, self.sizes)
        return x if self.groups_first else _new(at, aten.transpose.int, x, 1, 2)

    def of_side(self, x: fx.Node, at: fx.Node) -> fx.Node:
        """A mask, bias or number beside scores in five dims, beside scores in four."""
        if len(shape_of(x)) <= 2:
            return x
        for _ in range(5 - len(shape_of(x))):
            x = _new(at, aten.unsqueeze.default, x, 0)
        return _new(at, aten.squeeze.dim, x, 1) if shape_of(x)[1:3] == (1, 1) else self.joined(x, at)


def _queries_keys(product: Product) -> tuple[fx.Node, fx.Node]:
    """Queries [B, X, Y, S, H] and keys [B, X or 1, Y or 1, T, H]."""
    if product.equation is None:
        return product.left, _new(product.node, aten.transpose.int, product.right, -1, -2)
    left, right, scores = product.equation
    (head,) = set(left) & set(right) - set(scores)
    return _laid_out(product.left, left, scores[:4] + head, product), _laid_out(
        product.right, right, scores[:3] + scores[4] + head, product
    )


def _value_operand(product: Product) -> fx.Node:
    """Values [B, X or 1, Y or 1, T, V]."""
    if product.equation is None:
        return product.right
    weights, values, _ = product.equation
    (last,) = set(values) - set(weights)
    return _laid_out(product.right, values, weights[:3] + weights[4] + last, product)


def _as_written(x: fx.Node, product: Product) -> fx.Node:
    """The result [B, X, Y, S, V] in the order of an einsum's dims."""
    if product.equation is None:
        return x
    weights, values, result = product.equation
    (last,) = set(values) - set(weights)
    order = weights[:4] + last
    return x if order == result else _new(product.node, aten.permute.default, x, [order.index(i) for i in result])


def _laid_out(x: fx.Node, letters: str, order: str, product: Product) -> fx.Node:
    """An operand with its dims in this order; those that it has not are of size 1."""
    have = [letter for letter in order if letter in letters]
    x = _new(product.node, aten.permute.default, x, [letters.index(letter) for letter in have])
    for place, letter in enumerate(order):
        if letter not in letters:
            x = _new(product.node, aten.unsqueeze.default, x, place)
    return x


def _on(node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The same call on other operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: instead.get(n, n))
    return call(node.graph, node.target, args, kwargs, like=node)  # type: ignore[arg-type]


def _new(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    return call(like.graph, target, args, like=like)
