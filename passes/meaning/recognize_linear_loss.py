"""recognize-linear-loss: a head and the cross entropy of its logits become one op that never holds all logits.

    cross_entropy_loss(linear(x, weight), labels)      lse - picked of linear_cross_entropy(x, weight, labels)

Between them may stand casts, scales, a softcap, slices and other views of rows. Label smoothing, class weights and
ignored labels are written behind the op, for each row; a logsumexp of the logits (z-loss) reads the op's. Logits that
somebody else reads, or that are no wider than the rows before the head, are built as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

import spcompile.losses.linear_cross_entropy  # noqa: F401  (defines the op)
from spcompile.graph.edit import argument, call, erase_dead, is_tensor, operand, shape_of
from spcompile.graph.sizes import hint, same
from spcompile.graph.splice import splice
from spcompile.graph.typed_call import named_arguments
from spcompile.losses.linear_loss_call import LinearCrossEntropyCall
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.linear_heads import LinearHead, Moved, linear_head, readers

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2  # at::Reduction
_ENTROPY, _LOGSUMEXP, _SIZE = aten.cross_entropy_loss.default, aten.logsumexp.default, aten.sym_size.int


@dataclass(frozen=True)
class RecognizeLinearLoss(Pass):
    """Losses of logits that nothing else reads.

    wider_than: heads with more classes than this many times the width of a row are taken. The op computes the logits
    once more in the backward, which pays where they are the largest tensor.
    """

    wider_than: float = 1.0

    name: ClassVar[str] = "recognize-linear-loss"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-likelihood", "recognize-loss", "widen-sums"})
    summary: ClassVar[str] = "a head and its cross entropy become one op, which works in chunks of rows"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every head whose logits only losses read; returns how many losses and normalizers that are."""
        heads = [head for node in gm.graph.nodes if (head := self._wide_head(node)) is not None]
        products = {head.logits for head in heads}
        rewrites = 0
        for head in (head for head in heads if products.isdisjoint(head.logits.users)):  # else it lacks its bias
            reads = list(readers(head))
            if not any(_leads_to_loss(user, head.classes) for _, user in reads):
                continue
            others = [(user, why) for moved, user in reads if (why := _obstacle(moved, user)) is not None]
            if others:
                user, why = others[0]
                text = f"the logits {head.logits.name} {_sizes_of_logits(head)} are built: {why}"
                ctx.remarks.add("SPR208", text, head.logits if user.op == "output" else user, strict_error=False)
                continue
            rewrites += _rewrite_losses(head, reads)
        if rewrites:
            erase_dead(gm)
        return rewrites

    def _wide_head(self, node: fx.Node) -> LinearHead | None:
        head = linear_head(node) if node.op == "call_function" else None
        if head is None or not isinstance(head.classes, int) or not isinstance(head.width, int):
            return None
        return head if head.classes > self.wider_than * head.width and _is_of_the_model(head.weight) else None


def _sizes_of_logits(head: LinearHead) -> list[int]:
    return [hint(size) for size in shape_of(head.logits)]


def _is_of_the_model(weight: fx.Node) -> bool:
    """Whether a value is made of parameters and buffers only."""
    pending, seen = [weight], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and not (node.meta.get("trainable") or node.meta.get("state")):
            return False
        pending += [read for read in node.all_input_nodes if read not in seen]
        seen.add(node)
    return True


def _leads_to_loss(user: fx.Node, classes: int) -> bool:
    """Whether a cross entropy is behind a reader of logits, through values that have the classes as a dim."""
    pending, seen = [user], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.target is _ENTROPY:
            return True
        if node not in seen and is_tensor(node) and any(same(size, classes) for size in shape_of(node)):
            pending += node.users
        seen.add(node)
    return False


def _obstacle(logits: Moved, user: fx.Node) -> str | None:
    """Why what `user` reads must be built; None where the op has it."""
    if user.op == "output":
        return 'they are an output, which outputs="loss" would leave out'
    if user.target is _LOGSUMEXP:
        dims: Any = argument(user, 1, "dim")
        rank = len(shape_of(logits.value))
        return None if [dim % rank for dim in dims] == [logits.dim] else "a logsumexp runs over rows as well"
    if user.target is _SIZE and int(user.args[1]) != logits.dim:  # type: ignore[arg-type]
        return None
    if user.target is not _ENTROPY or operand(user, 0) is not logits.value:
        return f"{user.name} reads them"
    labels = operand(user, 1).meta["val"]
    if labels.is_floating_point() or labels.ndim != len(shape_of(logits.value)) - 1:
        return "the loss has probabilities as targets"
    if labels.ndim == 0 or labels.dtype != torch.int64 or logits.dim != 1:
        return "the loss is not over rows of logits with labels in int64"
    return "the loss is a mean over valid rows" if argument(user, 3, "reduction", MEAN) == MEAN else None


class _Loss(NamedTuple):
    """A cross entropy as the model wrote it, by the names of its arguments."""

    node: fx.Node
    labels: fx.Node
    weight: fx.Node | None
    reduction: int
    ignore_index: int
    smoothing: float

    @classmethod
    def of(cls, node: fx.Node) -> _Loss:
        args = named_arguments(node.target, node.args, node.kwargs)
        names = ("target", "weight", "reduction", "ignore_index", "label_smoothing")
        return cls(node, *[args[name] for name in names])

    @property
    def needed(self) -> list[fx.Node]:
        """What it reads besides logits."""
        return [self.labels] if self.weight is None else [self.labels, self.weight]

    def can_stand_before(self, normalizers: Sequence[tuple[Moved, fx.Node]]) -> bool:
        """Whether there are normalizers, and what it reads does not depend on them."""
        return bool(normalizers) and _made_of(*self.needed).isdisjoint(node for _, node in normalizers)


def _rewrite_losses(head: LinearHead, reads: Sequence[tuple[Moved, fx.Node]]) -> int:
    """One op for each loss; a normalizer of the same rows reads the op of the first of them."""
    groups: dict[Any, list[tuple[Moved, fx.Node]]] = {}
    for logits, user in reads:
        if user.target is _SIZE:
            user.replace_input_with(logits.value, logits.of(head.x, head.width, like=user))
        rows = logits.rows
        groups.setdefault((rows.moves, rows.dim, rows.steps), []).append((logits, user))
    for members in groups.values():
        losses = [(logits, user) for logits, user in members if user.target is _ENTROPY]
        normalizers = [(logits, user) for logits, user in members if user.target is _LOGSUMEXP]
        lse: fx.Node | None = None
        for logits, user in losses:
            written = _Loss.of(user)
            shared = [n for _, n in normalizers] if lse is None and written.can_stand_before(normalizers) else []
            loss, found = _write_loss(head, logits.rows, written, shared)
            lse = found if shared else lse
            user.replace_all_uses_with(loss)
        for logits, user in normalizers:
            found = lse if lse is not None else _write_normalizer(head, logits.rows, user)
            user.replace_all_uses_with(_as_logsumexp(found, user))
    return len(reads)


def _made_of(*values: fx.Node) -> set[fx.Node]:
    """The values and all that they are made of."""
    found: set[fx.Node] = set()
    pending = list(values)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _first_of(nodes: Sequence[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    return next(node for node in nodes[0].graph.nodes if node in wanted)


def _write_loss(head: LinearHead, rows: Moved, loss: _Loss, normalizers: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """(the loss, lse of its rows), in front of all that reads either."""
    place = _first_of([loss.node, *normalizers])
    if place is not loss.node:
        _move_before(place, loss.needed)
    x = rows.of(head.x, head.width, like=place)
    weight = head.weight_of_classes(like=place)
    options = (loss.reduction, loss.ignore_index, loss.smoothing)
    args = (x, weight, head.bias, loss.labels, loss.weight, rows.dim, str(rows.steps), *options)
    value, lse = splice(entropy_of_rows, args, like=place)
    dtype = loss.node.meta["val"].dtype
    if value.meta["val"].dtype != dtype:  # one loss a row, of logits in half precision
        value = call(place.graph, aten.to.dtype, (value, dtype), like=place)
    return value, lse


def _move_before(place: fx.Node, needed: Sequence[fx.Node]) -> None:
    """Let all that `needed` are made of stand in front of `place`, in the order that it has."""
    wanted, is_behind = _made_of(*needed), False
    for node in list(place.graph.nodes):
        is_behind = is_behind or node is place
        if is_behind and node in wanted:
            place.prepend(node)


def _write_normalizer(head: LinearHead, rows: Moved, like: fx.Node) -> fx.Node:
    x = rows.of(head.x, head.width, like=like)
    args = (x, head.weight_of_classes(like=like), head.bias, rows.dim, str(rows.steps))
    return splice(normalizer_of_rows, args, like=like)


def _as_logsumexp(lse: fx.Node, node: fx.Node) -> fx.Node:
    """`lse` in the shape and dtype of a logsumexp."""
    found, written = lse.meta["val"], node.meta["val"]
    lse = splice(lambda lse, written: _in_shape(lse, written.shape), (lse, node), like=node)
    return lse if found.dtype == written.dtype else call(node.graph, aten.to.dtype, (lse, written.dtype), like=node)


def entropy_of_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    dim: int,
    steps: str,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(cross entropy, lse of the rows). x has its width in `dim`; labels have the other dims, or are flat."""
    x, classes = _width_last(x, dim), weight.shape[0]
    rows = _in_shape(labels, x.shape[:-1])
    sums = LinearCrossEntropyCall(
        x=x,
        weight=weight,
        bias=bias,
        labels=rows,
        class_weight=class_weight if smoothing else None,
        classes=classes,
        steps=steps,
        ignore_index=ignore_index,
        with_total=smoothing != 0,
    )
    lse, picked, total = sums.run()
    valid = aten.ne.Scalar(rows, ignore_index)
    loss: Tensor = lse - picked
    of_all: Any = classes
    if class_weight is not None:
        wide = class_weight.to(lse.dtype)
        loss = loss * wide.index_select(0, aten.where.ScalarOther(valid, rows, 0).reshape(-1)).reshape(rows.shape)
        of_all = wide.sum()
    if smoothing:
        loss = (1 - smoothing) * loss + (of_all * lse - total) * (smoothing / classes)
    loss = aten.where.ScalarOther(valid, loss, 0.0)
    if reduction == SUM:
        return loss.sum(), lse
    return _in_shape(loss, labels.shape), lse


def _in_shape(x: Tensor, shape: Sequence[Any]) -> Tensor:
    is_so = x.ndim == len(shape) and all(map(same, x.shape, shape))
    return x if is_so else x.reshape(shape)


def _width_last(x: Tensor, dim: int) -> Tensor:
    return x if dim == x.ndim - 1 else x.movedim(dim, -1)


def normalizer_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, steps: str) -> Tensor:
    """The lse of rows that no loss reads."""
    x = _width_last(x, dim)
    labels = torch.zeros_like(x[..., 0], dtype=torch.int64)
    sums = LinearCrossEntropyCall(x=x, weight=weight, bias=bias, labels=labels, classes=weight.shape[0], steps=steps)
    return sums.run()[0]


def _loss_of_tokens(x_BSD: Tensor, head_CD: Tensor, labels_BS: Tensor) -> Tensor:
    logits_BSC = 30 * torch.tanh(torch.nn.functional.linear(x_BSD, head_CD) / 30)
    return torch.nn.functional.cross_entropy(logits_BSC[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def _inputs() -> tuple[Tensor, ...]:
    x_BSD, head_CD = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6, 4), (9, 4)))
    return x_BSD, head_CD, torch.randint(0, 9, (2, 6))


EXAMPLE = Example(_loss_of_tokens, _inputs)
