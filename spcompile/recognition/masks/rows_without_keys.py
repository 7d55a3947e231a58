"""Rows that see no key, where the plain model fills masked scores with a large negative number instead of -inf.

There every score is that number, so the weights are uniform over all T keys, also over those that are masked:
out = mean(v). If the number was added to scores s, it absorbed them; their gradient is still that of a softmax,
grad s_ij = (1/T) (grad out_i . (v_j - mean(v))), which is the gradient of (1/T) sum_j s_ij (v_j - mean(v)), linear in
q_i and k_j. If it replaced the scores, they have no gradient. Both need sums over keys only: nothing is S x T.

Where that will not do, as under a softcap, such rows are those of one document with all keys in a second attention.
Its mask says by which number its scores are `rounded_by`; other rows see nothing there, and add zeros. Where the mask
itself tells which rows these are, and nothing but the mask is different there, both are one attention whose mask has a
`fill`.

B batch, N query heads, G key heads, S query rows, T keys, H head size of q and k, V of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcompile.attention.scores.mask import EXCLUDES, WITHOUT_KEYS, AttentionMask

LOWEST = torch.finfo(torch.float32).min


def absorbing(dtype: torch.dtype) -> float:
    """A number from which on downwards its sum with a score of up to 32 is this number again."""
    return -64 / torch.finfo(dtype).eps


def absorbs(number: float, dtype: torch.dtype) -> bool:
    """Whether this number added to a score is this number again, where they are added in `dtype`."""
    return number <= absorbing(dtype)


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
    is_one_number = (
        (top <= absorbing(bias_BNST.dtype)) & (top > -torch.inf) & (bias_BNST.detach().amin(-1, keepdim=True) == top)
    )
    marks = torch.zeros_like(top).masked_fill(is_one_number, -torch.inf)
    return bias_BNST.masked_fill(is_one_number, -torch.inf), marks.squeeze(-1)


def without_large_numbers(
    whole_BNST: Tensor, part_BNST: Tensor, q_BNSH: Tensor, k_BGTH: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For a bias of unknown numbers: its part in an attention that loses none of them, and in one of absorbed scores.

    whole: the bias, [B|1, N|1, S|1, T]. part: of its terms those whose numbers are unknown, broadcastable to that.
    dtype: what scores are rounded to once they are added.

    Rows whose greatest number is large are shifted by it, for a log-sum-exp near such a number has no room for anything
    else. Where it absorbs scores, the first part is -inf, and the second is 0 for keys that have it, else -inf. Such
    rows and all keys are of one document by the ids, [B|1, S] and [1, T].
    """
    whole_BNST = whole_BNST.detach()
    top = whole_BNST.amax(-1, keepdim=True)
    is_absorbed = (top <= absorbing(dtype)) & (top > -torch.inf)
    shift = top.masked_fill((top > EXCLUDES) | is_absorbed | (top == -torch.inf), 0.0)
    small = (part_BNST - shift).masked_fill(is_absorbed, -torch.inf)
    absorbed = _nothing_but_gradient(part_BNST, (whole_BNST == top) & is_absorbed)
    marks_BNS = torch.zeros_like(top).masked_fill(is_absorbed, -torch.inf).amin(1, keepdim=True).squeeze(-1)
    return small, absorbed, *marked_as_documents(marks_BNS, q_BNSH, k_BGTH)


def large_numbers_apart(part_BN1T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A bias of unknown numbers for each key: without large ones; and of these for rows that see no key without them.

    Of rows whose large numbers absorb scores the second part is -inf, of others the third. The second is relative to
    the greatest large number of a sequence; the third is 0 for keys that have it, else -inf.
    """
    number = part_BN1T.detach()
    is_large = (number <= EXCLUDES) & (number > -torch.inf)
    top = number.masked_fill(~is_large, -torch.inf).amax(-1, keepdim=True)
    is_absorbed = top <= absorbing(dtype)
    relative = (part_BN1T - top).masked_fill(~is_large | is_absorbed, -torch.inf)
    absorbed = _nothing_but_gradient(part_BN1T, (number == top) & is_large & is_absorbed)
    return part_BN1T.masked_fill(is_large, -torch.inf), relative, absorbed


def rounded_by(x: Tensor, number: float) -> Tensor:
    """What is left of x once a large number was added and taken away; with the gradient of x."""
    return x + ((x + number) - number - x).detach()


def _nothing_but_gradient(x: Tensor, where: Tensor) -> Tensor:
    """A bias of 0 with the gradient of x where this holds, else -inf."""
    return (x - x.detach()).masked_fill(~where, -torch.inf)


def as_documents(mask: str, key_valid_BT: Tensor | None, q_BNSH: Tensor, k_BGTH: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B|1, S] and [B|1, T] by which rows that see no key are of one document with all keys, and others with none.

    mask: text of a mask without documents. It leaves a row some keys one after the other, of which some are valid.
    """
    S, T = q_BNSH.shape[2], k_BGTH.shape[2]
    rows_S = torch.arange(S, device=q_BNSH.device)
    first_S, last_S = AttentionMask.parse(mask).reach_of_each(rows_S, T)
    if key_valid_BT is None:
        key_valid_BT = torch.ones((1, T), dtype=torch.bool, device=q_BNSH.device)
    before_BT = torch.nn.functional.pad(key_valid_BT.cumsum(1), (1, 0))  # how many of the keys in front are valid
    seen_BS = before_BT[:, (last_S + 1).clamp(min=0)] - before_BT[:, first_S.clamp(max=T)]
    return (seen_BS > 0).to(torch.int64), torch.zeros_like(key_valid_BT, dtype=torch.int64)


def open_rows_as_documents(
    mask: str, key_valid_BT: Tensor | None, q_BNSH: Tensor, k_BGTH: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids int32 [B|1, S] and [B|1, T] under which a mask with a fill means what this one does, which has none.

    mask: as in `as_documents`. Valid keys are of one document with all rows, but for those that see none.
    """
    sees_BS, _ = as_documents(mask, key_valid_BT, q_BNSH, k_BGTH)
    q_ids_BS = sees_BS.to(torch.int32) + WITHOUT_KEYS
    if key_valid_BT is None:
        return q_ids_BS, torch.zeros((1, k_BGTH.shape[2]), dtype=torch.int32, device=q_BNSH.device)
    return q_ids_BS, (~key_valid_BT).to(torch.int32)


def open_rows_of_dense(
    keep_BNST: Tensor, bias_BNST: Tensor | None, q_BNSH: Tensor, k_BGTH: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(bias, ids of rows, ids of keys) by which rows without keys under a dense mask see all keys, with their bias.

    keep: bool, one for all heads, [B|1, 1, S|1, T].
    """
    has_keys_BNS1 = keep_BNST.any(-1, keepdim=True)
    keep_BNST = keep_BNST | ~has_keys_BNS1
    bias = keep_BNST if bias_BNST is None else torch.where(keep_BNST, bias_BNST, -torch.inf)
    q_ids_BS = has_keys_BNS1[:, 0, :, 0].to(torch.int32) + WITHOUT_KEYS
    k_ids_1T = torch.zeros((1, k_BGTH.shape[2]), dtype=torch.int32, device=q_BNSH.device)
    return bias, q_ids_BS.expand(-1, q_BNSH.shape[2]), k_ids_1T


def marked_as_documents(marks_BNS: Tensor, q_BNSH: Tensor, k_BGTH: Tensor) -> tuple[Tensor, Tensor]:
    """The same ids from marks that are -inf in rows without keys, for all heads alike."""
    ids_BS = (marks_BNS[:, 0] != -torch.inf).to(torch.int64).expand(-1, q_BNSH.shape[2])
    return ids_BS, torch.zeros((1, k_BGTH.shape[2]), dtype=torch.int64, device=q_BNSH.device)


def both_documents(
    q_ids_BS: Tensor, k_ids_BT: Tensor, q_of_rows_BS: Tensor, k_of_rows_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids that are equal where both of two are; those of rows are as `marked_as_documents` makes them, 0 and 1."""
    return q_ids_BS.to(torch.int64) * 2 + q_of_rows_BS, k_ids_BT.to(torch.int64) * 2 + k_of_rows_BT


def of_both(one_BNSV: Tensor, lse_one_BNS: Tensor, other_BNSV: Tensor, lse_other_BNS: Tensor) -> Tensor:
    """An attention over the keys of both, from its results over those of each; 0 in rows that see none."""
    is_empty_BNS = (lse_one_BNS == -torch.inf) & (lse_other_BNS == -torch.inf)
    lses = [lse.masked_fill(is_empty_BNS, 0.0) for lse in (lse_one_BNS, lse_other_BNS)]  # else gradients are NaN
    total_BNS = torch.logaddexp(*lses)
    one, other = ((lse - total_BNS).exp()[..., None].to(one_BNSV.dtype) for lse in lses)
    return one * one_BNSV + other * other_BNSV


def _by_query_head(x_BGYZ: Tensor, repeats: int) -> Tensor:
    return x_BGYZ if repeats == 1 else x_BGYZ.repeat_interleave(repeats, 1)
