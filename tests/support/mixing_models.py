"""Small models whose rows meet in other ways than by attention, or beside it: written for memory, one layer or two.

B batch, S sequence, D width, F hidden width, H and W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...]]


class ResponseNorm(nn.Module):
    """Each channel of an image scaled by its norm over all places, beside the mean norm (Woo et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))

    def forward(self, x_BHWF: Tensor) -> Tensor:
        norm_B11F = torch.linalg.vector_norm(x_BHWF, dim=(1, 2), keepdim=True)
        return self.scale * (x_BHWF * (norm_B11F / (norm_B11F.mean(-1, keepdim=True) + 1e-6))) + x_BHWF


class ImageBlock(nn.Module):
    """A convolution of each channel, then an MLP over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.inner, self.response = nn.Linear(width, 4 * width), ResponseNorm(4 * width)
        self.outer = nn.Linear(4 * width, width)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        h_BHWD = self.norm(self.around(x_BDHW).permute(0, 2, 3, 1))
        y_BHWD = self.outer(self.response(F.gelu(self.inner(h_BHWD))))
        return x_BDHW + y_BHWD.permute(0, 3, 1, 2)


class Image(nn.Module):
    """One block, fewer places, and the largest place of each channel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(ImageBlock(width), nn.Conv2d(width, width, 2, 2))
        self.head = nn.Linear(width, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x_BCHW)).amax((2, 3)))


def image() -> Built:
    return Image(), (torch.randn(2, 3, 32, 16),)


def attend(q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor, heads: int = 4) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BSD, k_BSD, v_BSD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))


class Stream(nn.Module):
    """One of the streams that meet in an attention: its own norms, projections and MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.taken, self.mlp = nn.Linear(width, width), mlp(width)

    def project(self, x_BSD: Tensor) -> list[Tensor]:
        h_BSD = self.norm(x_BSD)
        return [projection(h_BSD) for projection in self.given]

    def forward(self, x_BSD: Tensor, seen_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.taken(seen_BSD)
        return x_BSD + self.mlp(self.second(x_BSD))


class TwoStreams(nn.Module):
    """Text and image, each with weights of its own, in one attention (Esser et al. 2024)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ends = nn.ModuleList((nn.Linear(5, width), nn.Linear(6, width)))
        self.streams = nn.ModuleList((Stream(width), Stream(width)))

    def forward(self, text_BTC: Tensor, image_BSC: Tensor) -> tuple[Tensor, ...]:
        parts = [end(x) for end, x in zip(self.ends, (text_BTC, image_BSC), strict=True)]
        projected = [stream.project(x) for stream, x in zip(self.streams, parts, strict=True)]
        seen = attend(*(torch.cat(both, 1) for both in zip(*projected, strict=True)))
        seen = seen.split([text_BTC.shape[1], image_BSC.shape[1]], dim=1)
        return tuple(stream(x, y) for stream, x, y in zip(self.streams, parts, seen, strict=True))


class OneProjection(nn.Module):
    """Text and image, each with norms of its own, put together in front of projections and the MLP."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.ends = nn.ModuleList((nn.Linear(5, width), nn.Linear(6, width)))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.given = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.taken, self.mlp = nn.Linear(width, width), mlp(width)

    def forward(self, text_BTC: Tensor, image_BSC: Tensor) -> tuple[Tensor, ...]:
        T = text_BTC.shape[1]
        parts = [end(x) for end, x in zip(self.ends, (text_BTC, image_BSC), strict=True)]
        h_BSD = torch.cat([norm(x) for norm, x in zip(self.norms[:2], parts, strict=True)], 1)
        seen_BSD = self.taken(attend(*(projection(h_BSD) for projection in self.given)))
        parts = [parts[0] + seen_BSD[:, :T], parts[1] + seen_BSD[:, T:]]
        h_BSD = self.mlp(torch.cat([norm(x) for norm, x in zip(self.norms[2:], parts, strict=True)], 1))
        return parts[0] + h_BSD[:, :T], parts[1] + h_BSD[:, T:]


def text_and_image(kind: type[nn.Module]) -> Built:
    return kind(), (torch.randn(2, 8, 5), torch.randn(2, 24, 6))


KINDS: dict[str, Callable[[], Built]] = {
    "response norm": image,
    "two streams": lambda: text_and_image(TwoStreams),
    "streams, one projection": lambda: text_and_image(OneProjection),
}
