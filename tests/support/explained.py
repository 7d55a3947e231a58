"""A small model without data, explained: its tables are known by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile import explain
from spcompile.report.plan import Plan

WIDTH, VOCAB, HEADS = 16, 32, 4


class Attention(nn.Module):
    """Causal attention and its projections, each head of its own key and value."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False, dtype=dtype)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        B, S, _ = x_BSD.shape
        q, k, v = (t.view(B, S, HEADS, -1).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, -1))
        y_BNSH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y_BNSH.transpose(1, 2).reshape(B, S, WIDTH))


class Model(nn.Module):
    """A few attention layers; the loss is a mean over tokens."""

    def __init__(self, layers: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH, dtype=dtype)
        self.layers = nn.ModuleList(Attention(dtype) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.tokens(ids_BS)
        for layer in self.layers:
            x_BSD = x_BSD + layer(x_BSD)
        logits_BSV = self.head(x_BSD)
        return F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS.flatten())


def plan_of(mesh: int = 2, length: int = 64, layers: int = 2, rows: int = 1, **options: Any) -> Plan:
    with torch.device("meta"):
        model, ids = Model(layers), torch.zeros(rows, length, dtype=torch.int64)
    return explain(model, {"ids_BS": ids}, mesh={"cp": mesh}, **options)
