"""Plain models whose sequence is made of parts: a class token, registers, two streams in one attention, pooling.

B batch, S sequence, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from plain_models import HEADS, VOCAB, WIDTH, SelfAttention, generator_of, ids
from torch import Tensor, nn


def heads(x_BSD: Tensor) -> Tensor:
    return x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Stream(nn.Module):
    """What one of several sequences has of its own in a joint block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended)
        return x + self.mlp(self.after(x))


class TextAndImage(nn.Module):
    """Two blocks in which all see all, each with weights of its own; then one over both; the image is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.patches = nn.Embedding(VOCAB, WIDTH), nn.Linear(6, WIDTH)
        self.text = nn.ModuleList(Stream() for _ in range(2))
        self.image = nn.ModuleList(Stream() for _ in range(2))
        self.both, self.norm, self.head = SelfAttention(causal=False), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, prompt: Tensor, pixels: Tensor) -> Tensor:
        a, b = self.embedding(prompt), self.patches(pixels)
        for text, image in zip(self.text, self.image, strict=True):
            of_text, of_image = (stream.qkv(stream.norm(x)).chunk(3, -1) for stream, x in ((text, a), (image, b)))
            q, k, v = (torch.cat((heads(t), heads(i)), 2) for t, i in zip(of_text, of_image, strict=True))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            a, b = text.add(a, y[:, : a.shape[1]]), image.add(b, y[:, a.shape[1] :])
        h = torch.cat((a, b), 1)
        h = h + self.both(self.norm(h))
        return F.mse_loss(self.head(h[:, a.shape[1] :]), pixels)


def text_and_image(number: int, *, text: int = 9, image: int = 24) -> dict[str, Any]:
    return {"prompt": ids(number, text), "pixels": torch.randn(2, image, 6, generator=generator_of(number))}


class ClassAttention(nn.Module):
    """Patches with registers behind them attend to each other; then a class token to them, and its result once more."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.registers = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(3, WIDTH))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = nn.ModuleList(SelfAttention(causal=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.keys = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor, label: Tensor) -> Tensor:
        B = pixels.shape[0]
        h = torch.cat((self.patches(pixels), self.registers.expand(B, -1, -1)), 1)
        for layer, norm in zip(self.layers, self.norms[:2], strict=True):
            h = h + layer(norm(h))
        h, token = h[:, : pixels.shape[1]], self.token.expand(B, -1, -1)
        for norm, keys in zip(self.norms[2:], self.keys, strict=True):
            k, v = keys(norm(torch.cat((token, h), 1))).chunk(2, -1)
            token = token + F.scaled_dot_product_attention(heads(token), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(token[:, 0]), label)


def images(number: int, *, length: int = 29) -> dict[str, Any]:
    return {"pixels": torch.randn(2, length, 6, generator=generator_of(number)), "label": torch.tensor([1, 2])}


class DeepPrompt(nn.Module):
    """The same learned rows in front of every layer's input, and what they became is added to all others."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.prompt = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(2, WIDTH))
        self.layers = nn.ModuleList(SelfAttention(causal=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, pixels: Tensor, label: Tensor) -> Tensor:
        h = self.patches(pixels)
        for layer in self.layers:
            h = torch.cat((self.prompt.expand(pixels.shape[0], -1, -1), h), 1)
            h = h + layer(h)
            h = h[:, 2:] + h[:, :1]
        return F.cross_entropy(self.head(h.sin().mean(1) + h[:, 3]), label)
