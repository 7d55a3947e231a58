"""Convolutions along the sequence: ranks send each other what windows have in common, nobody gathers.

B batch, S sequence, D width, K width of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import check_pipeline, nodes_of
from rule_calls import call, x
from torch import Tensor

from spcompile.sharding.rules import rule_of


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attend(x_BSD: Tensor, causal: bool = False) -> Tensor:
    h = x_BSD.unflatten(-1, (2, -1)).transpose(1, 2)
    return x_BSD + F.scaled_dot_product_attention(h, h, h, is_causal=causal).transpose(1, 2).flatten(2)


def along(x_BSD: Tensor, w: Tensor, **settings: Any) -> Tensor:
    return F.conv1d(x_BSD.transpose(1, 2), w, **settings).transpose(1, 2)


def centred(x_BSD: Tensor, w_DDK: Tensor, b_D: Tensor) -> Tensor:
    h_BSD = attend(x_BSD)
    return attend((h_BSD + along(h_BSD, w_DDK, bias=b_D, padding=1).sin()).cos())


def causal(x_BSD: Tensor, w_DDK: Tensor, b_D: Tensor) -> Tensor:
    """Written both ways: padded in front, and padded at both ends and cut."""
    h_BSD = attend(x_BSD, causal=True)
    h_BSD = h_BSD * along(F.pad(h_BSD, (0, 0, 2, 0)), w_DDK, bias=b_D).sin()
    h_BSD = h_BSD + along(h_BSD, w_DDK, padding=2)[:, : x_BSD.shape[1]].cos()
    return attend(h_BSD, causal=True)


def gaps_between_channels(x_BSD: Tensor, w_DDK: Tensor, b_D: Tensor) -> Tensor:
    """Each channel by itself, and in pairs; taps stand apart, an even number of them reaches further back."""
    h_BSD = attend(x_BSD)
    h_BSD = h_BSD + along(h_BSD, w_DDK[:, :1], bias=b_D, padding="same", dilation=3, groups=h_BSD.shape[-1]).sin()
    h_BSD = h_BSD * along(h_BSD, w_DDK[:, :2, :2], padding="same", groups=h_BSD.shape[-1] // 2)
    return attend(h_BSD, causal=True)


def shorter(x_BSD: Tensor, w_DDK: Tensor, b_D: Tensor) -> Tensor:
    """Every second place, then every fourth: each length has a layout of its own, and an attention."""
    h_BSD = attend(along(attend(x_BSD), w_DDK, bias=b_D, stride=2, padding=1).sin())
    return attend(along(h_BSD, w_DDK, stride=2, padding=2, dilation=2).sin())


def every_second(x_BSD: Tensor, w_DDK: Tensor, b_D: Tensor) -> Tensor:
    h_BSD = attend(x_BSD)
    evens, odds, thirds = attend(h_BSD[:, ::2] + b_D), h_BSD[:, 1::2].sin(), h_BSD[:, -7::3].cos()
    return evens.sum(1) + odds.sum(1) + thirds.sum(1)


def cut_out(x_BSD: Tensor, w_DDK: Tensor, b_D: Tensor) -> Tensor:
    """Windows as views, and copied beside each other, weighted by what each place says."""
    h_BSD = attend(x_BSD)
    seen = torch.einsum("bsdk,dek->bse", h_BSD.unfold(1, 3, 2).sin(), w_DDK)
    around = F.unfold(h_BSD.transpose(1, 2)[..., None], (3, 1), padding=(1, 0)).unflatten(1, (-1, 3))
    weights = torch.einsum("bsd,dek->bkes", h_BSD + b_D, w_DDK)
    return attend(seen).mean(1) + (around * weights.transpose(1, 2)).sum((2, 3))


CASES: dict[str, Callable[..., Tensor]] = {
    "centred": centred,
    "causal": causal,
    "gaps between channels": gaps_between_channels,
    "shorter": shorter,
    "every second": every_second,
    "cut out": cut_out,
}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("length", [12, 9])
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
@pytest.mark.parametrize("name", CASES)
def test_nobody_gathers(name: str, attention: str, degree: int, length: int) -> None:
    inputs = [made(2, length, 4), made(4, 4, 3), made(4)]
    program = check_pipeline(CASES[name], inputs, {"cp": degree}, attention=attention)
    assert {remark.code for remark in program.ctx.remarks.rows} <= {"SPR203"}
    assert nodes_of(program, "spx.halo")


def blocks(x_BSD: Tensor, q_DD: Tensor, out_DD: Tensor, w_DDK: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    """Heads, a convolution of the residual stream, and one of each channel of a hidden layer."""
    h = (x_BSD @ q_DD).unflatten(-1, (2, -1)).transpose(1, 2)
    x_BSD = x_BSD + F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2) @ out_DD
    x_BSD = x_BSD + along(x_BSD, w_DDK, padding=1).sin()
    f_BSF = F.gelu(F.layer_norm(x_BSD, x_BSD.shape[-1:]) @ up_DF)
    f_BSF = along(f_BSF, w_DDK.flatten(0, 1)[: f_BSF.shape[-1], None], padding=1, groups=f_BSF.shape[-1])
    return x_BSD + f_BSF @ down_FD


@pytest.mark.thinned(10)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 2, "cp": 2}, {"tp": 3}])
def test_between_the_blocks_of_tp(mesh: dict[str, int]) -> None:
    """The stream is split along the sequence there; hidden channels are split as their products are.

    What cp has halos of is whole on its ranks of tp.
    """
    inputs = [made(2, 9, 4), made(4, 4), made(4, 4), made(4, 4, 3), made(4, 6), made(6, 4)]
    program = check_pipeline(blocks, inputs, mesh)
    assert {remark.code for remark in program.ctx.remarks.rows} <= {"SPR203", "SPR503", "SPR505", "SPR502"}
    halos = [node.args[-3] for node in nodes_of(program, "spx.halo")]
    assert halos.count("tp") == (0 if "cp" in mesh else 1)
    assert halos.count("cp") == (2 if "cp" in mesh else 0)


def test_text() -> None:
    rule = rule_of(call("conv1d", x(2, 4, 8), x(6, 4, 3), None, [2], [1], [2]).node())
    assert rule is not None
    assert rule.moving is not None
    assert rule.moving.text() == "a d e, b d [f] -> a b c | d: sum, c: of e"
    (window,) = rule.moving.windows.values()
    assert (window.of, window.step, window.before, window.extent) == ("e", 2, 1, 5)
