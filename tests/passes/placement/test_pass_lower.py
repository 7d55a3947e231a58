"""lower: whole programs on all ranks give one device's outputs and gradients, whatever they do with the sequence.

B batch, S sequence, D width. Every program holds an attention, or there would be nothing to shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import check_pipeline, nodes_of
from torch import Tensor

S, D = 7, 4
Program = Callable[..., Any]


def x(*shape: int) -> Tensor:
    return (0.5 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


def attend(h_BSD: Tensor, causal: bool = True) -> Tensor:
    h_B1SD = h_BSD.unsqueeze(1)
    return F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=causal).squeeze(1)


def cross(q_BSD: Tensor, k_BTD: Tensor, causal: bool = False) -> Tensor:
    q_B1SD, k_B1TD = q_BSD.unsqueeze(1), k_BTD.unsqueeze(1)
    return F.scaled_dot_product_attention(q_B1SD, k_B1TD, k_B1TD, is_causal=causal).squeeze(1)


def rotate(h: Tensor) -> Tensor:
    at = torch.arange(h.shape[1], dtype=h.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=h.dtype)
    a, b = h.chunk(2, -1)
    return torch.cat([a * at.cos() - b * at.sin(), a * at.sin() + b * at.cos()], -1)


def layers(h: Tensor, w: Tensor, v: Tensor) -> Tensor:
    for _ in range(2):
        h = h + attend(F.rms_norm(h, (D,), v) @ w)
    return h.pow(2).mean()


def two_losses(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    y = attend(h @ w)
    first = F.cross_entropy(y.flatten(0, 1), labels.flatten())
    return first + F.cross_entropy((y @ w)[:, :-2].flatten(0, 1), labels[:, 2:].flatten(), label_smoothing=0.1)


def per_row_loss(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    rows = F.cross_entropy(attend(h @ w).flatten(0, 1), labels.flatten(), reduction="none").view(2, -1)
    return (rows * (labels > 0)).sum(1) / (labels > 0).sum(1)


def router(h: Tensor, w: Tensor, g: Tensor) -> Tensor:
    y = attend(h @ w)
    p = (y @ g).softmax(-1)
    top, index = p.topk(1, -1)
    balance = (p.mean((0, 1)) * F.one_hot(index[..., 0], 3).to(p.dtype).mean((0, 1))).sum()
    return (y * top).sum() + balance


def detached(h: Tensor, w: Tensor) -> Tensor:
    y = attend(h @ w)
    with torch.no_grad():
        scale = y.mean()
    return (y * scale).sum()


def in_place(h: Tensor, w: Tensor) -> Tensor:
    y = attend(h @ w).clone()
    y[:, 0] = 0.0
    return y.mul_(2.0).sum()


def nested_prefixes(h: Tensor, w: Tensor) -> Tensor:
    y = attend(h @ w)[:, :-1]
    return (y[:, :-1] * 2).pow(2).mean() + y.sum()


def documents_over(h: Tensor, w: Tensor, documents: Tensor) -> Tensor:
    q = (h @ w).unsqueeze(1)
    mask = documents[:, None, :, None] == documents[:, None, None, :]
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).pow(2).sum()


def patches(h_BDHW: Tensor) -> Tensor:
    return h_BDHW.flatten(2).transpose(1, 2)


def documents(length: int) -> Tensor:
    return torch.arange(length).div(4, rounding_mode="floor").expand(2, length).contiguous()


# name: (program, shapes of its float inputs, other inputs)
PROGRAMS: dict[str, tuple[Program, list[tuple[int, ...]], Callable[[], list[Tensor]]]] = {}


def program(name: str, function: Program, *shapes: tuple[int, ...], rest: Callable[[], list[Tensor]] = list) -> None:
    PROGRAMS[name] = (function, [(2, S, D), (D, D), *shapes], rest)


program("pooled", lambda h, w: attend(h @ w).mean(1))
program("last token", lambda h, w: attend(h @ w)[:, -1] @ w)
program("scalar and sequence", lambda h, w: (attend(h @ w).mean(), attend(h @ w), h * 2))
program("two layers", layers, (D,))
program("weight decay in the loss", lambda h, w: attend(h @ w).pow(2).sum() + w.pow(2).sum())
program("bias", lambda h, w, b: (attend(F.linear(h, w, b)) + b).pow(2).mean((1, 2)), (D,))
program("position table by index", lambda h, w, p: attend((h + p[torch.arange(h.shape[1])]) @ w).sum(), (16, D))
program("position table by slice", lambda h, w, p: attend((h + p[: h.shape[1]]) @ w).sum(), (16, D))
program("rotary", lambda h, w: (attend(rotate(h @ w)) @ w).sum())
program("shifted labels", two_losses, rest=lambda: [ids(D, 2, S)])
program("loss per row", per_row_loss, rest=lambda: [ids(D, 2, S)])
program("mean squared error", lambda h, w, t: F.mse_loss(attend(h @ w), t), (2, S, D))
program("router", router, (D, 3))
program("no_grad", detached)
program("in place", in_place)
program("prefixes", nested_prefixes)
program("attention over a prefix", lambda h, w: attend(attend(h @ w)[:, :5] @ w).pow(2).sum() + h.sum())
program("prefix tokens", lambda h, w, p: attend(torch.cat([p.expand(2, -1, -1), h], 1) @ w)[:, 2:].sum(), (1, 2, D))
program("sequence in two dims", lambda h, w: (attend(h @ w) @ attend(h @ w).mT).softmax(-1).pow(2).sum())
program("linear attention", lambda h, w: attend(h @ w) @ (h.mT @ h))
program("convolution", lambda h, w, k: F.conv1d(attend(h @ w).mT, k, padding=1).mT * h, (D, D, 3))
program("reversed", lambda h, w: (attend(h @ w) + attend(h.flip(1) @ w).flip(1)).pow(2).sum())
program("roll", lambda h, w: (attend(h @ w) * h.roll(1, 1)).sum())
program("variance of all", lambda h, w: attend(h @ w).var())
program("softmax over positions", lambda h, w: attend(h @ w).softmax(1).pow(2).sum())
program("sequence first", lambda h, w: attend(h @ w).transpose(0, 1) * 2)
program("cross attention", lambda h, w, m: cross(h @ w, m @ w).pow(2).sum(), (2, 5, D))
program("causal cross attention", lambda h, w, m: cross(h @ w, m @ w, True).pow(2).sum(), (2, 5, D))
program("encoder and decoder", lambda h, w, m: cross(attend(h), attend(m, False)).sum(), (2, 5, D))
program("two towers", lambda h, w, m: attend(h @ w).mean(1) @ attend(m @ w).mean(1).T, (2, 5, D))
program("one key", lambda h, w, m: cross(h @ w, m @ w).pow(2).sum(), (2, 1, D))
program("one query", lambda h, w, m: cross(m @ w, h @ w).pow(2).sum(), (2, 1, D))
program("documents", documents_over, rest=lambda: [documents(S)])
PROGRAMS["batch equals sequence"] = (lambda h, w: attend(h @ w).sum(0), [(S, S, D), (D, D)], list)
PROGRAMS["scores written out without a softmax"] = (
    lambda h, w: (lambda y: ((y @ y.mT).sigmoid() @ y).pow(2).sum())(attend(h @ w)),
    [(2, S, D), (D, D)],
    list,
)
PROGRAMS["one batch"] = (lambda h, w: (attend(h @ w) * h).sum(), [(1, S, D), (D, D)], list)
PROGRAMS["one position"] = (lambda h, w: attend(h @ w).pow(2).sum(), [(2, 1, D), (D, D)], list)
PROGRAMS["fewer positions than ranks"] = (lambda h, w: attend(h @ w).pow(2).sum(), [(2, 3, D), (D, D)], list)
PROGRAMS["patches"] = (lambda h, w: (attend(patches(h) @ w) @ w).pow(2).mean(1), [(2, D, 5, 3), (D, D)], list)
PROGRAMS["patches, prefix"] = (lambda h, w: attend(patches(h) @ w)[:, :-1].pow(2).sum(), [(2, D, 4, 4), (D, D)], list)
PROGRAMS["patches, documents"] = (
    lambda h, w, d: documents_over(patches(h), w, d),
    [(2, D, 5, 3), (D, D)],
    lambda: [documents(15)],
)


@pytest.mark.thinned(30)
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, degree: int) -> None:
    function, shapes, rest = PROGRAMS[name]
    check_pipeline(function, [*(x(*shape) for shape in shapes), *rest()], {"cp": degree}, attention="ring")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", ["two layers", "shifted labels", "prefixes", "cross attention"])
def test_the_balance_of_the_sequence(name: str) -> None:
    function, shapes, rest = PROGRAMS[name]
    inputs = [*(x(*shape) for shape in shapes), *rest()]
    check_pipeline(function, inputs, {"cp": 2}, attention="ring", balance="contiguous")


def test_without_parallelize_attention_keys_are_gathered() -> None:
    program = check_pipeline(
        documents_over, [x(2, S, D), x(D, D), documents(S)], {"cp": 4}, passes={"parallelize-attention": False}
    )
    assert nodes_of(program, "spx.attention")
    assert not nodes_of(program, "spx.ring_attention")


def test_images_are_rings_of_their_rows() -> None:
    function, shapes, _ = PROGRAMS["patches"]
    program = check_pipeline(function, [x(*shape) for shape in shapes], {"cp": 2}, attention="ring")
    assert "SPR202" not in [remark.code for remark in program.ctx.remarks.rows]
    assert nodes_of(program, "spx.ring_attention")


def unit(h: Tensor) -> Tensor:
    return h / h.norm(dim=-1, keepdim=True)


@pytest.mark.thinned(7)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_padding_is_never_a_division_by_zero(attention: str) -> None:
    """NaN in rows that nobody reads would still reach the gradients of w, as NaN times 0."""

    def normalised(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        q = unit(h @ w).unflatten(-1, (2, 2)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        return F.cross_entropy((unit(y) @ w).flatten(0, 1), labels.flatten())

    check_pipeline(normalised, [x(2, S, D), x(D, D), ids(D, 2, S)], {"cp": 2}, attention=attention)
