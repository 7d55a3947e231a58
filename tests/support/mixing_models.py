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


KINDS: dict[str, Callable[[], Built]] = {"response norm": image}
