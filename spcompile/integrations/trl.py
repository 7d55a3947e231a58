"""Trainers of TRL over a mesh: their fused head, written out.

    from spcompile.integrations.trl import SequenceParallelMixin

    class MyTrainer(SequenceParallelMixin, SFTTrainer):
        pass

TRL computes log-probabilities of a language model in tiles of tokens and vocabulary, by kernels that write to their
arguments: no compiler sees what they mean, and a part of the sequence cannot go on with a tile. Importing this module
puts the formula in the place of the kernel, for all Trainers of the process. Read from TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import trl.trainer.utils as fused_heads
from torch import Tensor

from spcompile.integrations.transformers import SequenceParallelMixin

__all__ = ["SequenceParallelMixin"]

KERNEL, PICKS_TOKENS = "_ChunkedLogProbFunction", "_use_triton"


class WrittenOut:
    """What TRL's `ChunkedLogProbFunction` computes, of the same arguments."""

    @staticmethod
    def apply(
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = (),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities of targets, then what `outputs` names, and None for the rest, in TRL's order."""
        del chunk_size  # of tiles: there are none
        logits_NV = F.linear(hidden_ND, weight_VD, bias_V).float() * logit_scale
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        logits_NV = logits_NV / temperature
        log_probs_NV = F.log_softmax(logits_NV, dim=-1)
        log_probs_N = log_probs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)
        made: dict[str, Tensor] = {}
        if "entropy" in outputs:
            made["entropy"] = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                made["log_sum_sq_probs"] = (2 * log_probs_NV).exp().sum(-1).log()
            if "mean_logits" in outputs:
                made["mean_logits"] = logits_NV.mean(-1)
            if "is_top1" in outputs:
                made["is_top1"] = logits_NV.argmax(-1) == targets_N
        return log_probs_N, *(made.get(name) for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))


def _all_tokens(device: torch.device) -> bool:
    """Whether only tokens with labels are scored: how many there are would be in the shape of all that follows."""
    return False


for _name in (KERNEL, PICKS_TOKENS):
    if not hasattr(fused_heads, _name):
        raise ImportError(f"trl.trainer.utils has no {_name}: spcompile.integrations.trl was written for TRL 1.16")
setattr(fused_heads, KERNEL, WrittenOut)
setattr(fused_heads, PICKS_TOKENS, _all_tokens)
