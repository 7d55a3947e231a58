"""Rows that see no key, where the plain model fills masked scores with a large negative number instead of -inf.

There every score is that number, so the weights are uniform over all T keys, also over those that are masked:
out = mean(v). If the number was added to scores s, it absorbed them; their gradient is still that of a softmax,
grad s_ij = (1/T) (grad out_i . (v_j - mean(v))), which is the gradient of (1/T) sum_j s_ij (v_j - mean(v)), linear in
q_i and k_j. If it replaced the scores, they have no gradient. Both need sums over keys only: nothing is S x T.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABSORBS = -(2.0**100)  # a number below this plus a score is this number in float32, bfloat16 and float64


def with_uniform_rows(
    out_BNSV: Tensor, lse_BNS: Tensor, q_BNSH: Tensor, k_BGTH: Tensor, v_BGTV: Tensor, scale: float, added: bool
) -> Tensor:
    """The attention's output with mean(v) in the rows whose log-sum-exp is -inf.

    added: the number was added to the scores, not put in their place. Dropout leaves such rows alone.
    """
    repeats = q_BNSH.shape[1] // k_BGTH.shape[1]
    mean_BG1V = v_BGTV.mean(2, keepdim=True)
    uniform = _by_query_head(mean_BG1V, repeats)
    if added:
        one_BGT1 = k_BGTH[..., :1].detach()
        count_BG11 = (one_BGT1 == one_BGT1).to(k_BGTH.dtype).sum(2, keepdim=True)  # a sum over shards, unlike a size
        slope_BGVH = (v_BGTV - mean_BG1V).detach().mT @ k_BGTH * (scale / count_BG11)
        linear_BNSV = q_BNSH @ _by_query_head(slope_BGVH, repeats).mT
        uniform = uniform + (linear_BNSV - linear_BNSV.detach())
    return torch.where((lse_BNS == -torch.inf)[..., None], uniform, out_BNSV)


def _by_query_head(x_BGYZ: Tensor, repeats: int) -> Tensor:
    return x_BGYZ if repeats == 1 else x_BGYZ.repeat_interleave(repeats, 1)
