"""recognize-likelihood: the log-probability of a target, written out, becomes a cross entropy.

    nll_loss(log_softmax(x), t)               cross_entropy_loss(x, t)
    log_softmax(x).gather(t)                  -cross_entropy_loss(x, t, reduction=none)
    log_softmax(x)[arange(N), t]              the same
    x.gather(t) - logsumexp(x)                the same; also with log(sum(exp(x))), and the other way around
    torch's linear_cross_entropy in chunks    cross_entropy_loss(linear(x, w, b), t), for recognize-linear-loss

A cross entropy can be computed from logits of which every rank has some classes; anything else gathers them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import argument, call, erase_dead, is_tensor, operand, shape_of
from spcompile.graph.splice import splice
from spcompile.graph.typed_call import named_arguments
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.recognition.masks.index_maps import sizes_of
from spcompile.recognition.normalizers import normalizer
from spcompile.recognition.scores_chain import without_maximum
from spcompile.sharding.rules.indexing import is_range

aten = torch.ops.aten
_NLL = (aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default, aten.special_log_softmax.default)
# torch 2.13: torch/nn/modules/linear_cross_entropy.py
_CHUNKED = (
    "torch_nn::_linear_cross_entropy_batch_chunked",
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction",
)
_CHUNKED_TENSORS = ("input", "linear_weight", "target", "linear_bias", "weight")
NONE = 0  # at::Reduction
NOTHING = -(2**63)  # ignore_index: no target is this


@dataclass(frozen=True)
class RecognizeLikelihood(Pass):
    """Log-probabilities of targets become cross entropies of logits."""

    name: ClassVar[str] = "recognize-likelihood"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-softmax"})
    summary: ClassVar[str] = "log-probabilities of targets, written out, become cross entropies"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Rewrite every negative log-likelihood, every difference of a logit and a normalizer, every pick."""
        rewrites = 0
        for node in list(gm.graph.nodes):
            new = _of_loss(node) if node.target in _NLL else _of_difference(node) or _of_pick(node) or _of_chunks(node)
            if new is not None:
                node.replace_all_uses_with(new)
                rewrites += 1
        if rewrites:
            erase_dead(gm)
        return rewrites


class _Pick(NamedTuple):
    """One element of `of` in each row along `dim`, which is kept with size 1 or dropped; `target` says which one.

    wraps: a negative target counts from the end.
    """

    of: fx.Node
    dim: int
    target: fx.Node
    is_kept: bool
    wraps: bool = False


def _of_loss(loss: fx.Node) -> fx.Node | None:
    """A nll_loss of log-probabilities."""
    logs = operand(loss, 0)
    x = _logits(logs, min(1, len(shape_of(logs)) - 1))
    if x is None:
        return None
    weight, reduction, ignored = (
        argument(loss, 2, "weight"),
        argument(loss, 3, "reduction", 1),
        argument(loss, 4, "", -100),
    )
    args = (x, operand(loss, 1), weight, reduction, ignored)
    return call(loss.graph, aten.cross_entropy_loss.default, args, like=loss)


def _of_chunks(node: fx.Node) -> fx.Node | None:
    """The loss of torch's op in chunks, which returns gradients beside one that is summed."""
    is_first = node.target is operator.getitem and node.args[1] == 0
    made_by = operand(node, 0) if is_first else node
    schema = getattr(made_by.target, "_schema", None)
    if schema is None or schema.name not in _CHUNKED or is_first != (len(schema.returns) > 1):
        return None
    args = named_arguments(made_by.target, made_by.args, made_by.kwargs)
    x, weight, labels, bias, class_weight = (args[name] for name in _CHUNKED_TENSORS)
    options = args.get("reduction", "none"), args["ignore_index"], args.get("label_smoothing", 0.0)
    return splice(_loss_of_logits, (x, weight, labels, bias, class_weight, *options), like=node)


def _loss_of_logits(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    logits = aten.linear.default(x, weight, bias)
    code = ("none", "mean", "sum").index(reduction)  # at::Reduction
    return aten.cross_entropy_loss.default(logits, labels, class_weight, code, ignore_index, smoothing)


def _of_pick(node: fx.Node) -> fx.Node | None:
    """An element of log-probabilities for each row."""
    found = _pick(node)
    x = None if found is None else _logits(found.of, found.dim)
    if found is None or x is None:
        return None
    return splice(_log_probability, (x, *found[1:]), like=node)


def _of_difference(node: fx.Node) -> fx.Node | None:
    """A logit for each row without its normalizer, or the other way around."""
    if node.target is not aten.sub.Tensor or argument(node, 2, "alpha", 1) != 1:
        return None
    for (logit, total), result in ((node.args[:2], _log_probability), (node.args[1::-1], _entropy)):
        found, denominator = _pick(logit), normalizer(total)
        if found is None or denominator is None or found.of is not denominator.of:
            continue
        if (found.dim, found.is_kept) == (denominator.dim, denominator.is_kept):
            x = without_maximum(found.of, found.dim)
            return splice(result, (x, *found[1:]), like=node)
    return None


def _pick(node: Any) -> _Pick | None:
    if not is_tensor(node):
        return None
    dropped = node.args[1] if node.target is aten.squeeze.dim else None
    node = node.args[0] if dropped is not None else node
    if node.target is aten.gather.default:
        of, index = operand(node, 0), operand(node, 2)
        rank = len(shape_of(of))
        dim = argument(node, 1, "dim") % max(rank, 1)
        before, after = list(sizes_of(of)), list(sizes_of(index))
        if rank < 2 or after != [*before[:dim], 1, *before[dim + 1 :]] or dropped not in (None, dim, dim - rank):
            return None
        return _Pick(of, dim, index, dropped is None)
    if node.target is aten.index.Tensor and dropped is None:
        of, indices = operand(node, 0), node.args[1]
        if len(shape_of(of)) == len(indices) == 2 and all(map(is_tensor, indices)):
            rows, target = indices
            if is_range(rows, shape_of(of)[0]) and len(shape_of(rows)) == len(shape_of(target)) == 1:
                return _Pick(of, 1, target, False, wraps=True)
    return None


def _logits(logs: fx.Node, dim: int) -> fx.Node | None:
    """The x of log_softmax(x) over `dim`, in the shape and dtype of this, which nothing else reads."""
    if len(logs.users) != 1:
        return None
    if logs.target is aten.reshape.default:
        below, last = operand(logs, 0), len(shape_of(logs)) - 1
        if dim != last or not shape_of(below) or sizes_of(below)[-1] != sizes_of(logs)[-1]:
            return None
        x = _logits(below, len(shape_of(below)) - 1)
        return None if x is None else call(logs.graph, aten.reshape.default, (x, logs.args[1]), like=logs)
    if logs.target not in _LOG_SOFTMAX or argument(logs, 1, "dim") % len(shape_of(logs)) != dim:
        return None
    x, dtype = operand(logs, 0), logs.meta["val"].dtype
    return x if x.meta["val"].dtype == dtype else call(logs.graph, aten.to.dtype, (x, dtype), like=logs)


def _entropy(x: Tensor, dim: int, target: Tensor, is_kept: bool, wraps: bool) -> Tensor:
    rows = x.movedim(dim, -1)
    target = target % rows.shape[-1] if wraps else target
    loss = aten.cross_entropy_loss.default(rows.flatten(0, -2), target.reshape(-1), None, NONE, NOTHING)
    return loss.reshape(target.shape if is_kept else rows.shape[:-1])


def _log_probability(x: Tensor, dim: int, target: Tensor, is_kept: bool, wraps: bool) -> Tensor:
    return -_entropy(x, dim, target, is_kept, wraps)


def _likelihoods(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    picked = x.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return picked, x.exp().sum(-1).log() - x.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (2, 6))


EXAMPLE = Example(_likelihoods, _inputs)
