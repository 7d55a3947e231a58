"""Models that Dynamo makes several graphs of."""

from __future__ import annotations

import plain_models as pm
import torch
from data_models import PicturesInText
from torch import Tensor, nn


class BranchesOnValues(nn.Module):
    """A branch on a tensor between two attentions; numbers and a buffer cross with the activations."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = pm.SelfAttention(), pm.SelfAttention(causal=False)
        self.between = nn.Linear(pm.WIDTH, pm.WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        length = x.shape[1]
        x = x + self.first(x)
        if x.sum() > 0:
            x = 2 * x
        y = self.between(x) / length
        print(end="")
        y = y + self.second(y) * self.calls
        return {"loss": (x * y).square().mean(), "states": y}


class BranchesInLoop(nn.Module):
    """Dynamo leaves the loop to Python, and compiles the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(pm.SelfAttention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            if x.max() > 1:
                x = x / 2
        return x.square().mean()


class BrokenInside(nn.Module):
    """The break is in a module of the model; the outer module goes on behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = BranchesOnValues(), pm.SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return found["loss"] + self.last(found["states"]).square().mean()


class CountsPictures(PicturesInText):
    """Refuses inputs with other numbers of patches than tokens for them."""

    def check(self, is_picture_BS: Tensor, patches_PD: Tensor) -> None:
        count = is_picture_BS.sum()
        if count != patches_PD.shape[0]:
            raise ValueError(f"{count} tokens for {patches_PD.shape[0]} patches")


class PrintsFirst(pm.SelfAttention):
    """Breaks in front of all that it computes: one graph all the same."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        print(end="")
        return super().forward(x).square().mean()
