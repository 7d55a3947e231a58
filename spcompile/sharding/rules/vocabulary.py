"""Cross entropy over logits of which every rank has some classes (Shoeybi et al. 2019, section 3).

Every rank sends three or four numbers a row: its largest logit, its sum of exponentials, the target's logit if it has
it, and under label smoothing the sum of its logits. The logits themselves stay where they are.

N rows, C classes of this rank, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.calls import known_multiple
from spcompile.sharding.rules.rule import LocalCall

aten = torch.ops.aten
SUM = 2  # at::Reduction


def vocabulary_parallel(call: LocalCall) -> Tensor:
    """aten.cross_entropy_loss(reduction=none or sum) on logits [N, C] or [A, C, ...], where N is A and what follows C.

    Complete on every rank, computed in float32.
    """
    args = named_arguments(aten.cross_entropy_loss.default, call.args, call.kwargs)
    logits, target, ignored = args["self"], args["target"], args["ignore_index"]
    target_N = target.flatten()
    smoothing, classes = args["label_smoothing"], call.global_size
    assert call.ranks is not None
    first = call.ranks.first(classes, logits.device)
    x_NC = logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)
    if logits.dtype.itemsize < 4:
        x_NC = x_NC.to(torch.float32)
    present_C = None
    if not known_multiple(call.degree, classes):
        present_C = torch.arange(x_NC.shape[1], device=logits.device) + first < classes
        x_NC = x_NC.where(present_C, torch.finfo(x_NC.dtype).min)
    rows = [*_partial_logsumexp(x_NC), _target_logit(x_NC, target_N, first)]
    if smoothing:
        rows.append((x_NC if present_C is None else x_NC.where(present_C, 0)).sum(1))
    parts_RXN = call.ranks.gather(torch.stack(rows))
    lse_N = _logsumexp(parts_RXN[:, 0], parts_RXN[:, 1])
    loss_N = lse_N - parts_RXN[:, 2].sum(0)
    if smoothing:
        loss_N = (1 - smoothing) * loss_N + smoothing * (lse_N - parts_RXN[:, 3].sum(0) / classes)
    loss_N = loss_N.where(target_N != ignored, 0)
    return (loss_N.sum() if args["reduction"] == SUM else loss_N.reshape(target.shape)).to(logits.dtype)


def _partial_logsumexp(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """(largest, sum of exponentials over it) of each row."""
    largest_N = x_NC.detach().amax(1)
    return largest_N, (x_NC - largest_N.unsqueeze(1)).exp().sum(1)


def _target_logit(x_NC: Tensor, target_N: Tensor, first: Tensor) -> Tensor:
    """The target's logit where this rank has it, else 0."""
    place_N = target_N - first
    is_here_N = (place_N >= 0) & (place_N < x_NC.shape[1])
    return x_NC.gather(1, place_N.where(is_here_N, 0).unsqueeze(1)).squeeze(1).where(is_here_N, 0)


def _logsumexp(largest_RN: Tensor, sums_RN: Tensor) -> Tensor:
    largest_RN = largest_RN.detach()  # a shift of the exponent, of which the result does not depend
    largest_N = largest_RN.amax(0)
    return largest_N + (sums_RN * (largest_RN - largest_N).exp()).sum(0).log()
