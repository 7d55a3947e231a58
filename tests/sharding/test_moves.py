"""Sequences put together, cut and shifted: ranks send each other what goes over a border, nobody gathers.

B batch, S sequence, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import check_pipeline, nodes_of
from torch import Tensor

HEADS = 2


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def heads(x_BSD: Tensor) -> Tensor:
    return x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(x_BSD: Tensor, causal: bool = False) -> Tensor:
    h = heads(x_BSD)
    return x_BSD + F.scaled_dot_product_attention(h, h, h, is_causal=causal).transpose(1, 2).flatten(2)


def class_token(x_BSD: Tensor, cls_1D: Tensor, w_DD: Tensor) -> tuple[Tensor, Tensor]:
    h_BSD = (x_BSD @ w_DD).tanh()
    h_BSD = attend(torch.cat((cls_1D.expand(len(x_BSD), 1, -1), h_BSD), 1)).sin()
    return h_BSD[:, 0], h_BSD[:, 1:]


def last_token(x_BSD: Tensor, cls_1D: Tensor, w_DD: Tensor) -> Tensor:
    h_BSD = torch.cat(((x_BSD @ w_DD).tanh(), cls_1D.expand(len(x_BSD), 1, -1)), dim=-2)
    return attend(h_BSD, causal=True).sin()[:, -1]


def soft_prompt(x_BSD: Tensor, prompt_PD: Tensor, w_DD: Tensor) -> Tensor:
    """In front of every layer again, as in deep prompt tuning; and the whole is squared by itself."""
    for _ in range(2):
        h_BSD = attend(torch.cat((prompt_PD.expand(len(x_BSD), -1, -1), x_BSD), 1), causal=True)
        x_BSD = h_BSD[:, prompt_PD.shape[0] :] @ w_DD
    return x_BSD[:, :-1].square() + x_BSD[:, 1:]


def two_streams(a_BSD: Tensor, b_BSD: Tensor, w_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Each has weights of its own, and all see all."""
    for _ in range(2):
        q, k, v = (torch.cat((heads(a_BSD @ w), heads(b_BSD @ w.t())), 2) for w in (w_DD, w_DD.sin(), w_DD.cos()))
        y_BSD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y_a, y_b = y_BSD.split([a_BSD.shape[1], b_BSD.shape[1]], 1)
        a_BSD, b_BSD = a_BSD + y_a.sin(), b_BSD + y_b.cos()
    return a_BSD, b_BSD


def three_parts(a_BSD: Tensor, b_BSD: Tensor, w_DD: Tensor) -> Tensor:
    h_BSD = attend(torch.cat((a_BSD, b_BSD @ w_DD, a_BSD.sin()), 1))
    return h_BSD[:, : b_BSD.shape[1]] * h_BSD.narrow(1, a_BSD.shape[1], b_BSD.shape[1])


def shifted(a_BSD: Tensor, b_BSD: Tensor, w_DD: Tensor) -> Tensor:
    h_BSD = attend(a_BSD @ w_DD, causal=True)
    h_BSD = h_BSD + F.pad(h_BSD, (0, 0, 1, -1)).sin() + F.pad(h_BSD, (0, 0, -2, 2)).cos()
    h_BSD = h_BSD * torch.roll(h_BSD, 3, 1) + torch.roll(h_BSD, -1, 1)
    before = torch.cat((torch.zeros_like(h_BSD[:, :1]), h_BSD[:, :-1]), 1)
    return h_BSD.sin() + before.cos() + b_BSD.mean()


def flipped(x_BSD: Tensor, b_D: Tensor, w_DD: Tensor) -> Tensor:
    """Back to front by itself, with the width, inside of a product of dims, and within the entries of the batch."""
    h_BSD = attend(x_BSD @ w_DD, causal=True) + b_D
    h_BSD = h_BSD + attend(h_BSD.flip(1).sin(), causal=True).flip(1, 2)
    h_BSD = h_BSD * h_BSD.unflatten(1, (-1, 3)).flip(2, 1).flatten(1, 2).cos()
    return h_BSD + h_BSD.flatten(0, 1).flip(0).view_as(h_BSD)


def tokens(prompt_PD: Tensor, table_VD: Tensor, w_DD: Tensor, ids_BS: Tensor, more_BS: Tensor) -> Tensor:
    """Numbers of tokens and what pads them are put together too."""
    ids_BS = torch.cat((ids_BS, more_BS), 1)
    counts_BS = torch.cat((torch.ones(2, prompt_PD.shape[0], dtype=torch.bool), ids_BS != 0), 1)
    h_BSD = torch.cat((prompt_PD.expand(2, -1, -1), F.embedding(ids_BS, table_VD) @ w_DD), 1)
    h = heads(h_BSD)
    y = F.scaled_dot_product_attention(h, h, h, counts_BS[:, None, None, :]).transpose(1, 2).flatten(2)
    return (y * counts_BS[..., None])[:, prompt_PD.shape[0] :]


def patches(image_BHWD: Tensor, cls_1D: Tensor, w_DD: Tensor) -> tuple[Tensor, Tensor]:
    h_BSD = (image_BHWD @ w_DD).tanh().flatten(1, 2)
    h_BSD = attend(torch.cat((cls_1D.expand(len(h_BSD), 1, -1), h_BSD), 1))
    return h_BSD[:, 0], h_BSD[:, 1:].unflatten(1, image_BHWD.shape[1:3]).sin()


def pairs(x_BSD: Tensor, more_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """The whole is laid out by halves afterwards."""
    h_BSD = attend(torch.cat((x_BSD, more_BSD), 1) @ w_DD)
    return h_BSD.unflatten(1, (-1, 2)).sum(2)


CASES: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]] = {
    "class token": (class_token, lambda: [made(2, 12, 4), made(1, 4), made(4, 4)]),
    "class token, uneven": (class_token, lambda: [made(2, 9, 4), made(1, 4), made(4, 4)]),
    "last token": (last_token, lambda: [made(2, 12, 4), made(1, 4), made(4, 4)]),
    "soft prompt": (soft_prompt, lambda: [made(2, 12, 4), made(3, 4), made(4, 4)]),
    "two streams": (two_streams, lambda: [made(2, 5, 4), made(2, 14, 4), made(4, 4)]),
    "two streams, even": (two_streams, lambda: [made(2, 8, 4), made(2, 8, 4), made(4, 4)]),
    "three parts": (three_parts, lambda: [made(2, 5, 4), made(2, 9, 4), made(4, 4)]),
    "shifted": (shifted, lambda: [made(2, 11, 4), made(4), made(4, 4)]),
    "flipped": (flipped, lambda: [made(2, 12, 4), made(4), made(4, 4)]),
    "flipped, uneven": (flipped, lambda: [made(2, 9, 4), made(4), made(4, 4)]),
    "patches": (patches, lambda: [made(2, 5, 3, 4), made(1, 4), made(4, 4)]),
    "pairs": (pairs, lambda: [made(2, 5, 4), made(2, 7, 4), made(4, 4)]),
    "tokens": (
        tokens,
        lambda: [made(3, 4), made(7, 4), made(4, 4), torch.randint(0, 7, (2, 8)), torch.randint(0, 7, (2, 3))],
    ),
}

MORE_SAID = {
    "tokens": "SPR201",  # a mask that is put together stays dense
}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("name", CASES)
def test_nobody_gathers(name: str, attention: str, degree: int) -> None:
    function, inputs = CASES[name]
    program = check_pipeline(function, inputs(), {"cp": degree}, attention=attention)
    assert {remark.code for remark in program.ctx.remarks.rows} <= {"SPR203", MORE_SAID.get(name)}
    moved = [op for op in ("spx.move", "spx.place", "spx.pick") if nodes_of(program, op)]
    assert moved


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", CASES)
def test_contiguous_rings(name: str) -> None:
    function, inputs = CASES[name]
    check_pipeline(function, inputs(), {"cp": 3}, attention="ring", balance="contiguous")
