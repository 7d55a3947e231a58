"""Mixtures of experts as people write them: rows of tokens sorted by expert.

B batch, S sequence, D width, E experts, N tokens, K experts of a token, R = N * K rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile

B, S, D, E, K = 2, 10, 6, 4, 2
GATHERS = {"SPR102", "SPR103", "SPR107"}  # the remarks that say so
Body = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x_ND, expert_NK, weight_NK, w_EDD -> y_ND


class Mixture(nn.Module):
    """Attention, then experts as `body` applies them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.qkv = nn.Linear(D, 3 * D, dtype=torch.float64)
        self.gate = nn.Linear(D, E, dtype=torch.float64)
        self.w_EDD = nn.Parameter(torch.randn(E, D, D, dtype=torch.float64))

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x_BSD).chunk(3, -1))
        x_BSD = x_BSD + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        x_ND = x_BSD.reshape(-1, D)
        weight_NK, expert_NK = self.gate(x_ND).softmax(-1).topk(K)
        y_BSD = self.body(x_ND, expert_NK, weight_NK, self.w_EDD).reshape(x_BSD.shape)
        return (x_BSD + y_BSD).square().mean()


def states(batch: int = B, number: int = 0) -> Tensor:
    """Inputs of a mixture."""
    return torch.randn(batch, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1 + number))


def verify(body: Body, mesh: dict[str, int], batch: int = B, **options: Any) -> spcompile.Report:
    """All ranks against the plain mixture, exactly."""
    x_BSD = states(batch)
    report = spcompile.verify(Mixture(body), (x_BSD,), mesh=mesh, compiler="eager", tolerance=1e-10, **options)
    assert report.ok, str(report)
    return report


def apply(x_RD: Tensor, expert_R: Tensor, w_EDD: Tensor) -> Tensor:
    return F.gelu(torch.bmm(x_RD.unsqueeze(1), w_EDD[expert_R]).squeeze(1))


def inverse_by_writing(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * weight_NK.reshape(-1)[row_R].unsqueeze(-1)
    inverse_R = torch.empty_like(row_R)
    inverse_R[row_R] = torch.arange(row_R.shape[0])
    return y_RD[inverse_R].view(-1, K, D).sum(1)


def inverse_by_sorting(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.flatten().argsort(stable=True)
    token_R = row_R.div(K, rounding_mode="floor")
    y_RD = apply(x_ND.index_select(0, token_R), expert_NK[token_R, row_R % K], w_EDD)
    return (y_RD[row_R.argsort()].view(-1, K, D) * weight_NK.unsqueeze(-1)).sum(1)


def rows_written_back(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = torch.sort(expert_NK.reshape(-1), descending=True)
    y_RD = torch.zeros(expert_R.shape[0], D, dtype=x_ND.dtype)
    y_RD[row_R] = apply(x_ND[row_R // K], expert_R, w_EDD)
    return torch.einsum("nkd,nk->nd", y_RD.view(-1, K, D), weight_NK)


def added_to_tokens(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    row_R = expert_NK.reshape(-1).argsort()
    token_R, choice_R = row_R // K, row_R % K
    y_RD = apply(x_ND[token_R], expert_NK[token_R, choice_R], w_EDD) * weight_NK[token_R, choice_R, None]
    return x_ND.index_add(0, token_R, y_RD)


def scattered_to_tokens(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    token_RD = (row_R // K).unsqueeze(-1).expand(-1, D)
    y_RD = apply(x_ND.gather(0, token_RD), expert_R, w_EDD) * weight_NK.view(-1)[row_R, None]
    return torch.zeros_like(x_ND).scatter_add(0, token_RD, y_RD)


def tokens_of_each_choice(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """Rows are [K, N], so that the token is a remainder, by a number that ranks have only a part of."""
    expert_R, row_R = expert_NK.t().reshape(-1).sort()
    token_R, choice_R = row_R % x_ND.shape[0], row_R // x_ND.shape[0]
    y_RD = apply(x_ND[token_R], expert_R, w_EDD) * weight_NK[token_R, choice_R, None]
    return torch.zeros_like(x_ND).index_add(0, token_R, y_RD)


def accumulated(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    expert_R, row_R = expert_NK.reshape(-1).sort()
    y_RD = apply(x_ND[row_R // K], expert_R, w_EDD) * weight_NK.view(-1)[row_R, None]
    return torch.zeros_like(x_ND).index_put((row_R // K,), y_RD, accumulate=True)


def picked_and_written(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """A loop over experts, each of which reads and writes rows of the tokens that it picks."""
    y_ND, mask_NKE = torch.zeros_like(x_ND), expert_NK.unsqueeze(-1) == torch.arange(E)
    for expert in range(E):
        token, choice = torch.where(mask_NKE[..., expert])
        y_ND[token] += weight_NK[token, choice, None] * torch.tanh(x_ND[token] @ w_EDD[expert])
    return y_ND


def picked_and_added(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """The same with masks [K, N], through views."""
    y_ND, mask_EKN = torch.zeros_like(x_ND), F.one_hot(expert_NK, E).permute(2, 1, 0)
    for expert in range(E):
        choice, token = torch.where(mask_EKN[expert])
        picked = torch.tanh(x_ND[None, token].reshape(-1, D) @ w_EDD[expert])
        y_ND = y_ND.index_add(0, token, picked * weight_NK[token, choice, None])
    return y_ND


def one_expert_a_token(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """As code for any number of experts a token divides by it."""
    expert_N, row_N = expert_NK[:, :1].reshape(-1).sort()
    y_ND = apply(x_ND[row_N // 1], expert_N, w_EDD) * weight_NK[:, :1].reshape(-1)[row_N].unsqueeze(-1)
    return torch.zeros_like(x_ND).index_copy(0, row_N, y_ND)


def grouped(x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, w_EDD: Tensor) -> Tensor:
    """Two grouped products, and a row of the first matrix as a bias."""
    expert_R, row_R = expert_NK.reshape(-1).sort()
    ends_E = torch.histc(expert_R.double(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    h_RD = F.gelu(product(x_ND[row_R // K], w_EDD, ends_E) + w_EDD[expert_R, 0])
    return weighted(product(h_RD, w_EDD, ends_E), row_R, weight_NK)


def grouped_mixture() -> Mixture:
    """A mixture that is `grouped`, and the op that it calls."""
    importlib.import_module("transformers.integrations.moe")
    return Mixture(grouped)


def product(x_RD: Tensor, w_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """A grouped product that runs in float64 too."""
    y_RF: Tensor = torch.ops.transformers.grouped_mm_fallback(x_RD, w_EDF, ends_E)
    return y_RF


def weighted(y_RD: Tensor, row_R: Tensor, weight_NK: Tensor) -> Tensor:
    """Of sorted rows the weighted sums of tokens."""
    return (y_RD[row_R.argsort()].view(-1, K, D) * weight_NK.unsqueeze(-1)).sum(1)
