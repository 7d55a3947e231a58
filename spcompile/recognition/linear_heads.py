"""Logits of a linear head: what becomes of them between the product with the head's weight and those who read them.

Views that leave the classes alone can as well be made of the rows before the head; casts, scales and a softcap are
`LogitSteps`. Every other op reads the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from spcompile.graph.edit import argument, call, is_tensor, operand, shape_of
from spcompile.graph.sizes import same
from spcompile.losses.logit_steps import LogitStep, LogitSteps

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_FLATTENS = (aten.reshape.default, aten.flatten.using_ints)
_COPIES = (aten.clone.default, aten.contiguous.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_SCALES = {
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.true_divide.Tensor: "div",
}


@dataclass(frozen=True)
class LinearHead:
    """logits = x @ weight.T + bias. x [..., D]; weight [C, D], or [D, C] where it `is_transposed`; bias [C] or None."""

    logits: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    is_transposed: bool

    @property
    def classes(self) -> Any:
        """C."""
        return shape_of(self.logits)[-1]

    @property
    def width(self) -> Any:
        """D."""
        return shape_of(self.x)[-1]

    def weight_of_classes(self, *, like: fx.Node) -> fx.Node:
        """The weight as [C, D]."""
        return call(like.graph, aten.t.default, (self.weight,), like=like) if self.is_transposed else self.weight


@dataclass(frozen=True)
class Moved:
    """Logits behind some ops: `moves` moved rows, `steps` were done to each number; `dim` has the classes."""

    value: fx.Node
    dim: int
    moves: tuple[fx.Node, ...]
    steps: LogitSteps

    @property
    def rows(self) -> Moved:
        """The same rows without the views at their end that keep their order: reshapes, and moves of the classes."""
        moves, dim = self.moves, self.dim
        while moves:
            before = operand(moves[-1], 0)
            rank = len(shape_of(before))
            if moves[-1].target in _FLATTENS:
                dim = rank - 1
            else:
                order = _order_of_dims(moves[-1], rank)
                if order is None or (rows := [d for d in order if d != order[dim]]) != sorted(rows):
                    break
                dim = order[dim]
            moves = moves[:-1]
        return replace(self, moves=moves, dim=dim)

    def of(self, x: fx.Node, width: int, *, like: fx.Node) -> fx.Node:
        """The moves made of the rows before the head, whose last dim has `width`."""
        for move in self.moves:
            args = (x, *move.args[1:])
            if move.target is aten.reshape.default:
                sizes: Any = move.args[1]
                args = (x, [*sizes[:-1], width])
            x = call(like.graph, move.target, args, move.kwargs, like=like)  # type: ignore[arg-type]
        return x


def linear_head(node: fx.Node) -> LinearHead | None:
    """A product of rows with a matrix, and perhaps a vector that is added to each row."""
    if node.target is aten.linear.default:
        x, weight, bias = operand(node, 0), operand(node, 1), argument(node, 2, "bias")
        return LinearHead(node, x, weight, bias, is_transposed=False) if weight.meta["val"].ndim == 2 else None
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = (operand(node, place) for place in range(3))
        return _by_columns(node, x, weight, bias) if bias.meta["val"].ndim == 1 else None
    if node.target in (aten.matmul.default, aten.mm.default):
        return _by_columns(node, operand(node, 0), operand(node, 1), None)
    if node.target is aten.add.Tensor and argument(node, 2, "alpha", 1) == 1 and all(map(is_tensor, node.args[:2])):
        for product, bias in ((operand(node, 0), operand(node, 1)), (operand(node, 1), operand(node, 0))):
            head = linear_head(product) if bias.meta["val"].ndim == 1 else None
            if head is not None and head.bias is None and _is_bias(bias, head) and len(head.logits.users) == 1:
                return replace(head, logits=node, bias=bias)
    return None


def _is_bias(bias: fx.Node, head: LinearHead) -> bool:
    own, value = head.logits.meta["val"], bias.meta["val"]
    return same(value.shape[0], own.shape[-1]) and value.dtype == own.dtype


def _by_columns(node: fx.Node, x: fx.Node, columns: fx.Node, bias: fx.Node | None) -> LinearHead | None:
    if x.meta["val"].ndim < 2 or columns.meta["val"].ndim != 2:
        return None
    is_turned = columns.target in _TRANSPOSES
    return LinearHead(node, x, operand(columns, 0) if is_turned else columns, bias, is_transposed=not is_turned)


def readers(head: LinearHead) -> Iterator[tuple[Moved, fx.Node]]:
    """Every node that reads logits of a head, and what it reads them as."""
    pending = [Moved(head.logits, len(shape_of(head.logits)) - 1, (), LogitSteps())]
    while pending:
        logits = pending.pop()
        for user in logits.value.users:
            behind = _moved_behind(logits, user)
            if behind is None:
                yield logits, user
            else:
                pending.append(behind)


def _moved_behind(logits: Moved, user: fx.Node) -> Moved | None:
    """The logits behind an op that only moves rows, or is a step."""
    if not is_tensor(user) or not user.args or user.all_input_nodes[:1] != [logits.value]:
        return None
    step = _step_of(user)
    if step is not None:
        return replace(logits, value=user, steps=logits.steps.behind(step))
    if user.target in _COPIES:
        return replace(logits, value=user)
    dim = _dim_behind(logits, user)
    return None if dim is None else replace(logits, value=user, dim=dim, moves=(*logits.moves, user))


def _order_of_dims(move: fx.Node, rank: int) -> list[int] | None:
    """For every dim of the result of a transpose, the dim of its operand."""
    order = list(range(rank))
    if move.target is aten.t.default and rank == 2:
        return order[::-1]
    if move.target is aten.transpose.int:
        first, second = (int(move.args[place]) % rank for place in (1, 2))  # type: ignore[arg-type]
        order[first], order[second] = second, first
        return order
    if move.target is aten.movedim.int:
        source, goal = (int(move.args[place]) % rank for place in (1, 2))  # type: ignore[arg-type]
        order.insert(goal, order.pop(source))
        return order
    if move.target is aten.permute.default:
        given: Any = move.args[1]
        return [place % rank for place in given]
    return None


def _step_of(user: fx.Node) -> LogitStep | None:
    if user.target is aten.tanh.default:
        return LogitStep("tanh")
    before, after = operand_value(user), user.meta["val"]
    if user.target in _CASTS:
        is_moved = before.device != after.device or not after.is_floating_point()
        return None if is_moved else LogitStep("to", str(after.dtype).removeprefix("torch."))
    if user.target in _SCALES and len(user.args) == 2 and not user.kwargs and before.dtype == after.dtype:
        numbers = [x for x in user.args if isinstance(x, int | float) and not isinstance(x, bool)]
        is_quotient = _SCALES[user.target] == "div"
        if len(numbers) == 1 and not (is_quotient and numbers[0] is user.args[0]):
            return LogitStep(_SCALES[user.target], repr(float(numbers[0])))
    return None


def operand_value(user: fx.Node) -> Any:
    """The example value of the first node that a call reads."""
    return user.all_input_nodes[0].meta["val"]


def _dim_behind(logits: Moved, user: fx.Node) -> int | None:
    """Where the classes are behind a view that leaves them alone."""
    before, after = shape_of(logits.value), shape_of(user)
    dim, rank = logits.dim, len(before)
    if user.target in _FLATTENS:
        is_last = dim == rank - 1 and len(after) > 0 and same(before[-1], after[-1])
        return len(after) - 1 if is_last else None
    if (order := _order_of_dims(user, rank)) is not None:
        return order.index(dim)
    at: Any = argument(user, 1, "dim", 0)
    if user.target in (aten.slice.Tensor, aten.narrow.default):
        return dim if at % rank != dim else None
    if user.target is aten.select.int and at % rank != dim:
        return dim - 1 if at % rank < dim else dim
    if user.target is aten.unsqueeze.default:
        return dim + 1 if at % (rank + 1) <= dim else dim
    if user.target is aten.squeeze.dim and at % rank != dim:
        return dim - (len(after) < rank and at % rank < dim)
    return None
