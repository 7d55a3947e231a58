"""A BERT: bidirectional encoder with padded rows, token types, LayerNorm after each block, masked-token loss.

B batch, S sequence, D model width, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BertConfig:
    """Sizes of the model; the defaults train on a laptop. `context` is the longest sequence it has positions for."""

    vocab: int = 256
    context: int = 8192
    token_types: int = 2
    layers: int = 4
    heads: int = 8
    dim: int = 256

    @classmethod
    def tiny(cls) -> BertConfig:
        """For tests."""
        return cls(vocab=64, context=128, layers=2, heads=4, dim=32)

    @classmethod
    def bert_base(cls) -> BertConfig:
        """The sizes of BERT base."""
        return cls(vocab=30522, context=512, layers=12, heads=12, dim=768)


class Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        B, S, D = x_BSD.shape
        q_BNSH = self.q(x_BSD).view(B, S, self.heads, -1).transpose(1, 2)
        k_BNSH = self.k(x_BSD).view(B, S, self.heads, -1).transpose(1, 2)
        v_BNSH = self.v(x_BSD).view(B, S, self.heads, -1).transpose(1, 2)
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSH, attn_mask=mask_B11S)
        return self.out(y_BNSH.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, 4 * config.dim)
        self.down = nn.Linear(4 * config.dim, config.dim)
        self.mlp_norm = nn.LayerNorm(config.dim)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        x_BSD = self.attention_norm(x_BSD + self.attention(x_BSD, mask_B11S))
        return self.mlp_norm(x_BSD + self.down(F.gelu(self.up(x_BSD))))


class Bert(nn.Module):
    """forward(ids_BS) gives logits_BSV; with labels_BS (-100 but at masked tokens) the mean loss of those.

    keep_BS: bool, True at real tokens and False at padding, which no token attends to.
    token_types_BS: which segment a token belongs to; default 0 everywhere.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.token_types = nn.Embedding(config.token_types, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.transform = nn.Linear(config.dim, config.dim)
        self.transform_norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab)
        self.apply(init_weights)

    def forward(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        keep_BS: Tensor | None = None,
        token_types_BS: Tensor | None = None,
    ) -> Tensor:
        positions_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        types_BS = torch.zeros_like(ids_BS) if token_types_BS is None else token_types_BS
        x_BSD = self.norm(self.tokens(ids_BS) + self.positions(positions_S) + self.token_types(types_BS))
        mask_B11S = None if keep_BS is None else keep_BS[:, None, None, :]
        for block in self.blocks:
            x_BSD = block(x_BSD, mask_B11S)
        logits_BSV = self.head(self.transform_norm(F.gelu(self.transform(x_BSD))))
        if labels_BS is None:
            return logits_BSV
        return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=-100)


def init_weights(module: nn.Module) -> None:
    """Normal weights of deviation 0.02 and zero biases, drawn from torch's global seed."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def build(config: BertConfig) -> Bert:
    """The model, on torch's default device and in its default dtype."""
    return Bert(config)
