"""A GPT: learned positions, LayerNorm before each block, GELU MLP, tied output weights.

B batch, S sequence, D model width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the defaults train on a laptop. `context` is the longest sequence it has positions for."""

    vocab: int = 256
    context: int = 8192
    layers: int = 4
    heads: int = 8
    dim: int = 256
    dropout: float = 0.0

    @classmethod
    def tiny(cls) -> GPTConfig:
        """For tests."""
        return cls(vocab=64, context=128, layers=2, heads=4, dim=32)

    @classmethod
    def gpt2(cls) -> GPTConfig:
        """The sizes of GPT-2 small, with the byte-pair vocabulary padded to a multiple of 64."""
        return cls(vocab=50304, context=1024, layers=12, heads=12, dim=768)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, D = x_BSD.shape
        q_BSD, k_BSD, v_BSD = self.qkv(x_BSD).split(D, dim=-1)
        q_BNSH = q_BSD.view(B, S, self.heads, -1).transpose(1, 2)
        k_BNSH = k_BSD.view(B, S, self.heads, -1).transpose(1, 2)
        v_BNSH = v_BSD.view(B, S, self.heads, -1).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, dropout_p=dropout, is_causal=True)
        return self.out(y_BNSH.transpose(1, 2).reshape(B, S, D))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD)))
        return x_BSD + self.dropout(self.mlp(self.mlp_norm(x_BSD)))


class GPT(nn.Module):
    """forward(ids_BS) gives logits_BSV; with labels_BS (the ids, -100 where ignored) the mean next-token loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(init_weights)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        positions_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        x_BSD = self.dropout(self.tokens(ids_BS) + self.positions(positions_S))
        for block in self.blocks:
            x_BSD = block(x_BSD)
        logits_BSV = self.head(self.norm(x_BSD))
        if labels_BS is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def init_weights(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 and zero biases, drawn from torch's global seed."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build(config: GPTConfig) -> GPT:
    """The model, on torch's default device and in its default dtype."""
    return GPT(config)
