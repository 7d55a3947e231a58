"""Small models whose weights tp may split in different ways: fused projections, low rank, tied, no norms.

B batch, S sequence, D width, N heads, K key/value heads, H head width, F width inside the MLP, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HIDDEN = 22, 16, 20


def heads_of(x_BSD: Tensor, width: int) -> Tensor:
    return x_BSD.unflatten(-1, (-1, width)).transpose(1, 2)


def attend(q_BNSH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> Tensor:
    y_BNSH = F.scaled_dot_product_attention(q_BNSH, k_BKSH, v_BKSH, is_causal=True, enable_gqa=True)
    return y_BNSH.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(x_BSD)))


class FusedGate(nn.Module):
    """One matrix for gate and up, as Phi-3 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.outer = nn.Linear(WIDTH, 2 * HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.both(x_BSD).chunk(2, -1)
        return self.outer(F.silu(gate_BSF) * up_BSF)


class Grouped(nn.Module):
    """Projections of their own, with fewer key/value heads than query heads."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, head: int = 4) -> None:
        super().__init__()
        self.head = head
        self.a, self.b, self.c = (nn.Linear(WIDTH, n * head, bias=False) for n in (heads, kv_heads, kv_heads))
        self.d = nn.Linear(heads * head, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.d(attend(*(heads_of(f(x_BSD), self.head) for f in (self.a, self.b, self.c))))


class FusedSlices(nn.Module):
    """Phi-3: one matrix for query, key and value, cut by slices of unequal widths."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, head: int = 4) -> None:
        super().__init__()
        self.head, self.q, self.kv = head, heads * head, kv_heads * head
        self.all = nn.Linear(WIDTH, self.q + 2 * self.kv, bias=False)
        self.d = nn.Linear(self.q, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSE, q, kv = self.all(x_BSD), self.q, self.kv
        parts = x_BSE[..., :q], x_BSE[..., q : q + kv], x_BSE[..., q + kv :]
        return self.d(attend(*(heads_of(part, self.head) for part in parts)))


class FusedConv1D(nn.Module):
    """GPT-2: addmm on a flattened batch with a weight [in, out], then split."""

    def __init__(self, head: int = 4) -> None:
        super().__init__()
        self.head = head
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / 4), nn.Parameter(torch.randn(3 * WIDTH))
        self.d = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSE = torch.addmm(self.bias, x_BSD.reshape(-1, WIDTH), self.weight).view(*x_BSD.shape[:2], 3 * WIDTH)
        return self.d(attend(*(heads_of(part, self.head) for part in x_BSE.split(WIDTH, dim=2))))


class Interleaved(nn.Module):
    """GPT-NeoX: every head's query, key and value lie side by side in one matrix."""

    def __init__(self, heads: int = 4, head: int = 4) -> None:
        super().__init__()
        self.shape = (heads, 3, head)
        self.all, self.d = nn.Linear(WIDTH, heads * 3 * head), nn.Linear(heads * head, WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.all(x_BSD).unflatten(-1, self.shape).transpose(1, 2).unbind(3)
        return self.d(attend(q, k, v))


class LowRank(nn.Module):
    """DeepSeek: query and key/value pass through a narrow, normed space; a part of each key is shared by all heads."""

    def __init__(self, heads: int = 4, head: int = 6, rotary: int = 2, rank: int = 10) -> None:
        super().__init__()
        self.head, self.rotary, self.rank = head, rotary, rank
        self.q_down, self.q_up = nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, heads * head, bias=False)
        self.kv_down = nn.Linear(WIDTH, rank + rotary, bias=False)
        self.kv_up = nn.Linear(rank, heads * (head - rotary + head), bias=False)
        self.q_norm, self.kv_norm = nn.LayerNorm(rank), nn.LayerNorm(rank)
        self.d = nn.Linear(heads * head, WIDTH, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q_BNSH = heads_of(self.q_up(self.q_norm(self.q_down(x_BSD))), self.head)
        narrow_BSR, shared_BSH = self.kv_down(x_BSD).split([self.rank, self.rotary], -1)
        own = self.head - self.rotary
        k_BNSH, v_BNSH = heads_of(self.kv_up(self.kv_norm(narrow_BSR)), own + self.head).split([own, self.head], -1)
        shared_BNSH = shared_BSH.unsqueeze(1).expand(*k_BNSH.shape[:3], self.rotary)
        return self.d(attend(q_BNSH, torch.cat([k_BNSH, shared_BNSH], -1), v_BNSH))


class Model(nn.Module):
    """Embedding, one attention (none where it is None), one MLP, a head; the next-token loss and the logits."""

    def __init__(
        self, attention: nn.Module | None, mlp: nn.Module, *, norms: bool = True, tied: bool = False, vocab: int = VOCAB
    ) -> None:
        super().__init__()
        self.tokens, self.attention, self.mlp = nn.Embedding(vocab, WIDTH), attention, mlp
        self.first, self.second = (nn.LayerNorm(WIDTH) if norms else nn.Identity() for _ in range(2))
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def logits(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.tokens(ids_BS)
        if self.attention is not None:
            x_BSD = x_BSD + self.attention(self.first(x_BSD))
        return self.head(x_BSD + self.mlp(self.second(x_BSD)))

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> dict[str, Tensor]:
        logits_BSV = self.logits(ids_BS)
        loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
        return {"loss": loss, "logits": logits_BSV}


def batch(length: int = 9, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Two rows, a third of one ignored."""
    generator = torch.Generator().manual_seed(1)
    ids_BS, labels_BS = (torch.randint(vocab, (2, length), generator=generator) for _ in range(2))
    labels_BS[0, : length // 3] = -100
    return {"ids_BS": ids_BS, "labels_BS": labels_BS}
