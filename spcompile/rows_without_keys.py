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


def rows_of_one_number(bias_BNST: Tensor) -> tuple[Tensor, Tensor]:
    """A bias whose rows may hold one absorbing number throughout: such rows as -inf, and [B, N, S] -inf there, else 0.

    A log-sum-exp of such scores, lse = number + log(T), has no room for log(T), and with it the backward and a merge of
    blocks would lose how many keys there are. Rows that are -inf already have no keys, and average nothing.
    """
    top = bias_BNST.detach().amax(-1, keepdim=True)
    is_one_number = (top <= ABSORBS) & (top > -torch.inf) & (bias_BNST.detach().amin(-1, keepdim=True) == top)
    marks = torch.zeros_like(top).masked_fill(is_one_number, -torch.inf)
    return bias_BNST.masked_fill(is_one_number, -torch.inf), marks.squeeze(-1)


def _by_query_head(x_BGYZ: Tensor, repeats: int) -> Tensor:
    return x_BGYZ if repeats == 1 else x_BGYZ.repeat_interleave(repeats, 1)
