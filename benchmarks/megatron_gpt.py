"""The GPT of Korthikanti et al. (arXiv 2205.05198): scores held whole, dropout of their weights and of both branches.

Recompute as they had it: none, of attention's core ("selective"), or of whole layers ("full"), by torch's checkpoint.

B batch, S sequence, D model width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 51200  # section 6: v = 51200


@dataclass(frozen=True)
class Sizes:
    """recompute: "none", "selective" or "full"."""

    layers: int
    heads: int
    dim: int
    seq: int
    recompute: str = "none"
    dropout: float = 0.1
    vocab: int = VOCABULARY


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(H)) with dropout, times v: what "selective" makes again."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dropout = nn.Dropout(sizes.dropout)
        self.scale = (sizes.dim // sizes.heads) ** -0.5

    def forward(self, q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, hidden_SS: Tensor) -> Tensor:
        scores_BNSS = (q_BNSH @ k_BNSH.transpose(-1, -2)) * self.scale
        scores_BNSS = scores_BNSS.masked_fill(hidden_SS, torch.finfo(scores_BNSS.dtype).min)
        return self.dropout(F.softmax(scores_BNSS, dim=-1)) @ v_BNSH


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.core = CoreAttention(sizes)
        self.makes_core_again = sizes.recompute == "selective"
        self.attention_norm, self.mlp_norm = nn.LayerNorm(sizes.dim), nn.LayerNorm(sizes.dim)
        self.qkv, self.out = nn.Linear(sizes.dim, 3 * sizes.dim), nn.Linear(sizes.dim, sizes.dim)
        self.up, self.down = nn.Linear(sizes.dim, 4 * sizes.dim), nn.Linear(4 * sizes.dim, sizes.dim)
        self.attention_dropout, self.mlp_dropout = nn.Dropout(sizes.dropout), nn.Dropout(sizes.dropout)

    def attention(self, x_BSD: Tensor, hidden_SS: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        parts = self.qkv(x_BSD).view(B, S, self.heads, 3 * D // self.heads).transpose(1, 2).chunk(3, dim=-1)
        q_BNSH, k_BNSH, v_BNSH = parts
        core = functools.partial(checkpoint, self.core, use_reentrant=False) if self.makes_core_again else self.core
        y_BNSH = core(q_BNSH, k_BNSH, v_BNSH, hidden_SS)
        return self.out(y_BNSH.transpose(1, 2).reshape(B, S, D))

    def forward(self, x_BSD: Tensor, hidden_SS: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention_dropout(self.attention(self.attention_norm(x_BSD), hidden_SS))
        return x_BSD + self.mlp_dropout(self.down(F.gelu(self.up(self.mlp_norm(x_BSD)))))


class MegatronGPT(nn.Module):
    """forward(ids_BS, labels_BS) gives the mean next-token loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.makes_layers_again = sizes.recompute == "full"
        self.tokens, self.positions = nn.Embedding(sizes.vocab, sizes.dim), nn.Embedding(sizes.seq, sizes.dim)
        self.dropout = nn.Dropout(sizes.dropout)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, sizes.vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        S = ids_BS.shape[1]
        positions_S = torch.arange(S, device=ids_BS.device)
        hidden_SS = positions_S[:, None] < positions_S[None, :]
        x_BSD = self.dropout(self.tokens(ids_BS) + self.positions(positions_S))
        for layer in self.layers:
            if self.makes_layers_again:
                x_BSD = checkpoint(layer, x_BSD, hidden_SS, use_reentrant=False)
            else:
                x_BSD = layer(x_BSD, hidden_SS)
        logits_BSV = self.head(self.norm(x_BSD))
        return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
