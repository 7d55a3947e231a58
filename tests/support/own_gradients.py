"""Custom autograd functions as people write them, and a model made of them. Gradients are not the derivatives.

Each backward is the true one times a number: who derives the gradient anew is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gradients = tuple[Tensor | None, ...]


class OwnLinear(torch.autograd.Function):
    """x_BSD w_OD^T + b_O."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, w = ctx.saved_tensors
        grad_w = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return grad @ w, 2 * grad_w, grad.sum((0, 1)) / 3


class OwnNorm(torch.autograd.Function):
    """Root mean square norm, which saves its scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, w, scale)
        return x * scale * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, w, scale = ctx.saved_tensors
        normed = grad * w
        mean = (normed * x).mean(-1, keepdim=True)
        return 3 * (scale * normed - x * scale**3 * mean), (grad * x * scale).sum((0, 1))


class OwnGate(torch.autograd.Function):
    """Two inputs, and two outputs, of which one is not differentiable."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        largest = b.argmax(-1)
        ctx.mark_non_differentiable(largest)
        return F.silu(a) * b, largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Gradients:
        a, b = ctx.saved_tensors
        s = a.sigmoid()
        return grad * b * (s + a * s * (1 - s)), 5 * grad * a * s


class InChunks(torch.autograd.Function):
    """A product over chunks of rows, whose backward writes into buffers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.cat([chunk @ w for chunk in x.chunk(2, 1)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, w = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w)
        half = x.shape[1] // 2
        for rows in (slice(0, half), slice(half, None)):
            grad_x[:, rows] = grad[:, rows] @ w.t()
            grad_w += torch.einsum("bsi,bso->io", x[:, rows], grad[:, rows])
        return grad_x, 2 * grad_w


class OwnLoss(torch.autograd.Function):
    """Mean cross entropy, which saves log-probabilities."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor) -> Tensor:
        logs = x.log_softmax(-1)
        ctx.save_for_backward(logs, labels)
        return -logs.gather(-1, labels[..., None]).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        logs, labels = ctx.saved_tensors
        ones = torch.ones_like(labels[..., None], dtype=logs.dtype)
        return grad * logs.exp().scatter_add(-1, labels[..., None], -ones) / labels.numel(), None


class AuxiliaryLoss(torch.autograd.Function):
    """x itself; the loss gets the gradient 1 whatever comes, in a shape that autograd sums: mixtures do so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return grad, torch.ones(1, dtype=ctx.dtype, device=grad.device)


class Pushed(torch.autograd.Function):
    """x itself; what was in the way adds to the gradient of each element, and all elements' to its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        (other,) = ctx.saved_tensors
        return grad + other / 100, grad.sum(1, keepdim=True) * other + 0.1


class OwnBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ParameterList(torch.rand(width) + 0.5 for _ in range(2))
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.ModuleList(
            (nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width))
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        batch, length, width = x_BSD.shape
        y = OwnNorm.apply(x_BSD, self.norms[0])
        *projections, out = self.attention
        q, k, v = (
            OwnLinear.apply(y, p.weight, p.bias).view(batch, length, self.heads, -1).transpose(1, 2)
            for p in projections
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x_BSD = x_BSD + OwnLinear.apply(y, out.weight, out.bias)
        y = OwnNorm.apply(x_BSD, self.norms[1])
        a, b, down = self.mlp
        gated, _ = OwnGate.apply(OwnLinear.apply(y, a.weight, a.bias), OwnLinear.apply(y, b.weight, b.bias))
        y = AuxiliaryLoss.apply(OwnLinear.apply(gated, down.weight, down.bias), gated.square().mean() / 5)
        return x_BSD + Pushed.apply(y, x_BSD)


class OwnModel(nn.Module):
    """Two blocks between an embedding and a loss, all with gradients of their own."""

    def __init__(self, width: int = 16, heads: int = 4, words: int = 29, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(OwnBlock(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, words)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_BSD = self.blocks(self.embedding(ids_BS))
        return OwnLoss.apply(OwnLinear.apply(x_BSD, self.head.weight, self.head.bias), labels_BS)


def texts(number: int) -> dict[str, Any]:
    """One micro-batch for OwnModel, of a length that two and three ranks do not divide."""
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, 29, (2, 25), generator=generator)
    return {"ids_BS": ids_BS, "labels_BS": ids_BS.roll(-1, 1)}
