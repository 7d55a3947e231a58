"""A Llama: rotary positions, RMSNorm, SwiGLU, fewer key/value heads than query heads, untied output weights.

B batch, S sequence, D model width, N query heads, K key/value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model; the defaults train on a laptop. `hidden` is the width inside the MLP."""

    vocab: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    dim: int = 256
    hidden: int = 768
    theta: float = 10000.0

    @classmethod
    def tiny(cls) -> LlamaConfig:
        """For tests."""
        return cls(vocab=64, layers=2, heads=4, kv_heads=2, dim=32, hidden=48)

    @classmethod
    def llama3_8b(cls) -> LlamaConfig:
        """The sizes of Llama 3 8B."""
        return cls(vocab=128256, layers=32, heads=32, kv_heads=8, dim=4096, hidden=14336, theta=500000.0)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and angles are computed: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def rotary_angles(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos_SH and sin_SH of RoPE (https://arxiv.org/abs/2104.09864), the two halves of H rotated against each other."""
    dtype = at_least_float32(like.dtype)
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=dtype, device=like.device) / head_dim)
    positions_S = torch.arange(length, dtype=dtype, device=like.device)
    angles_SH = torch.outer(positions_S, frequencies).repeat(1, 2)
    return angles_SH.cos().to(like.dtype), angles_SH.sin().to(like.dtype)


def rotate(x_BNSH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    first, second = x_BNSH.chunk(2, dim=-1)
    return x_BNSH * cos_SH + torch.cat([-second, first], dim=-1) * sin_SH


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.q = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        q_BNSH = self.q(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        k_BKSH = self.k(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        v_BKSH = self.v(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        q_BNSH, k_BKSH = rotate(q_BNSH, cos_SH, sin_SH), rotate(k_BKSH, cos_SH, sin_SH)
        y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=True)
        return self.out(y_BNSH.transpose(1, 2).reshape(B, S, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.hidden, bias=False)
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim)
        self.mlp = MLP(config)

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SH, sin_SH)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class Llama(nn.Module):
    """forward(ids_BS) gives logits_BSV; with labels_BS (the ids, -100 where ignored) the mean next-token loss."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.apply(init_weights)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        x_BSD = self.tokens(ids_BS)
        cos_SH, sin_SH = rotary_angles(
            ids_BS.shape[1], self.config.dim // self.config.heads, self.config.theta, like=x_BSD
        )
        for block in self.blocks:
            x_BSD = block(x_BSD, cos_SH, sin_SH)
        logits_BSV = self.head(self.norm(x_BSD))
        if labels_BS is None:
            return logits_BSV
        # Every position keeps its logits; the last one, which has no next token, gets an ignored label.
        targets_BS = F.pad(labels_BS, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=-100)


def init_weights(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, drawn from torch's global seed."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def build(config: LlamaConfig) -> Llama:
    """The model, on torch's default device and in its default dtype."""
    return Llama(config)
