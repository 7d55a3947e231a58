"""Models whose numbers or sizes depend on values: routing by `nonzero`, counts read by `.item()`, pictures in text.

B batch, S sequence, D width, E experts, N tokens, P patches.
"""

from __future__ import annotations

import plain_models as pm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PICTURE = 7  # the token that stands for a patch
EXPERTS = 3


def states(number: int = 0, length: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, pm.WIDTH, generator=pm.generator_of(number))


def text_with_pictures() -> tuple[Tensor, Tensor]:
    """Tokens [B, S], some of which stand for patches, and the patches [P, D]."""
    tokens_BS = pm.ids(3, 9).where(pm.ids(3, 9) != PICTURE, 0)
    tokens_BS[0, 2:4] = tokens_BS[1, 5:8] = PICTURE
    return tokens_BS, states(1, 5, 1)[0]


class ChosenTokens(nn.Module):
    """Experts that each pick their tokens out of all of them by `torch.where`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = pm.SelfAttention()
        self.gate = nn.Linear(pm.WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(pm.WIDTH, pm.WIDTH) for _ in range(EXPERTS))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = (x_BSD + self.attention(x_BSD)).flatten(0, 1)
        weight_N2, chosen_N2 = self.gate(x_ND).softmax(-1).topk(2)
        y_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen_N2 == number)
            y_ND[token] += weight_N2[token, place, None] * expert(x_ND[token])
        return (x_ND + y_ND).square().mean()


class CountsByItem(pm.SelfAttention):
    """A loss over the number of valid labels, which Python reads."""

    def forward(self, x_BSD: Tensor, labels_BS: Tensor) -> Tensor:  # type: ignore[override]
        logits = super().forward(x_BSD)
        valid = (labels_BS >= 0).sum().item()
        return F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), ignore_index=-100, reduction="sum") / valid


class ValidRowsOnly(pm.SelfAttention):
    """A loss over the rows that a mask keeps."""

    def forward(self, x_BSD: Tensor, labels_BS: Tensor) -> Tensor:  # type: ignore[override]
        logits, keep_BS = super().forward(x_BSD), labels_BS >= 0
        return F.cross_entropy(logits[keep_BS], labels_BS[keep_BS])


class PicturesInText(nn.Module):
    """Patches take the places of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(pm.VOCAB, pm.WIDTH)
        self.project = nn.Linear(pm.WIDTH, pm.WIDTH)
        self.attention = pm.SelfAttention()

    def forward(self, tokens_BS: Tensor, patches_PD: Tensor) -> Tensor:
        x_BSD, is_picture_BS = self.embedding(tokens_BS), tokens_BS == PICTURE
        patches_PD = self.project(patches_PD)
        self.check(is_picture_BS, patches_PD)
        x_BSD = x_BSD.masked_scatter(is_picture_BS[..., None].expand_as(x_BSD), patches_PD)
        return self.attention(x_BSD).square().mean()

    def check(self, is_picture_BS: Tensor, patches_PD: Tensor) -> None:
        torch._check(is_picture_BS.sum().item() == patches_PD.shape[0])


def labels() -> Tensor:
    labels_BS = pm.ids(2, 9) % pm.WIDTH
    labels_BS[0, :3] = labels_BS[1, 4] = -100
    return labels_BS
