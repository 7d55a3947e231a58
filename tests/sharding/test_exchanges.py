"""What mixes the sequence runs over another dim meanwhile: all-to-alls there and back, and nobody gathers.

B batch, S sequence, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_numerics import check_pipeline, nodes_of, remarks_of
from torch import Tensor, nn

import spcompile
from spcompile.program.build import LocalProgram

HEADS = 4


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attend(x_BSD: Tensor) -> Tensor:
    h = x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return x_BSD + F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2).flatten(2)


def spectrum(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    h_BSD = attend(x_BSD @ w_DD)
    return h_BSD + torch.fft.fft(h_BSD.sin(), dim=1).real @ w_DD


def both_spectra(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """Over the width as well, of which a rank must have all, and with complex weights in between."""
    h_BSD = attend(x_BSD @ w_DD)
    filtered = torch.fft.rfft2(h_BSD, dim=(1, 2)) * w_DD[:1, :5]
    return h_BSD + torch.fft.irfft2(filtered, s=(x_BSD.shape[1], 8), dim=(1, 2))


def over_tokens(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """A product with a matrix of positions."""
    h_BSD = attend(x_BSD @ w_DD)
    positions = torch.arange(x_BSD.shape[1], dtype=torch.float64)
    mix_SS = (positions[:, None] * positions).cos()
    return h_BSD + F.linear(F.gelu(F.linear(h_BSD.mT, mix_SS)), mix_SS.sin()).mT @ w_DD


def recurrence(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """Written step by step."""
    h_BSD = attend(x_BSD @ w_DD)
    keep_BSD, new_BSD = h_BSD.sigmoid(), (h_BSD @ w_DD).sin()
    state_BD, states = torch.zeros_like(new_BSD[:, 0]), []
    for step in range(x_BSD.shape[1]):
        state_BD = keep_BSD[:, step] * state_BD + new_BSD[:, step]
        states.append(state_BD)
    return h_BSD + torch.stack(states, 1) @ w_DD


def halving(x: Tensor) -> Tensor:
    """Running sums of [B, S, D], by those of pairs."""
    if x.shape[1] == 2:
        return torch.cat((x[:, :1], x[:, :1] + x[:, 1:]), 1)
    pairs = halving(x[:, 0::2] + x[:, 1::2])
    evens = torch.cat((x[:, :1], pairs[:, :-1] + x[:, 2::2]), 1)
    return torch.stack((evens, pairs), 2).flatten(1, 2)


def scan_by_halves(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    """The sequence is cut into twos, but only in between."""
    x_BSD = torch.cat((x_BSD, x_BSD[:, :1].sin()), 1)
    h_BSD = attend(x_BSD @ w_DD)
    return h_BSD + halving(h_BSD.sin()) @ w_DD


MIXING = [spectrum, both_spectra, over_tokens, recurrence, scan_by_halves]


def check(mixing: Callable[..., Any], degree: int, attention: str) -> LocalProgram:
    return check_pipeline(mixing, (made(2, 7, 8), made(8, 8)), {"cp": degree}, attention=attention)


@pytest.mark.thinned(30)
@pytest.mark.parametrize(("degree", "attention"), [(2, "ring"), (3, "ring"), (2, "ulysses"), (4, "ulysses")])
@pytest.mark.parametrize("mixing", MIXING)
def test_values_and_gradients(mixing: Callable[..., Any], degree: int, attention: str) -> None:
    """Sequences in zigzag and in natural order, and numbers of channels that do not divide."""
    program = check(mixing, degree, attention)
    assert remarks_of(program, "SPR108")
    assert not remarks_of(program, "SPR103")
    assert nodes_of(program, "spx.all_to_all")
    (gather,) = nodes_of(program, "spx.all_gather")  # of the output
    assert [user.op for user in gather.users] == ["output"]


def test_all_steps_of_a_loop_go_together() -> None:
    program = check(recurrence, 2, "ring")
    assert len(nodes_of(program, "spx.all_to_all")) == 3  # gates, what is new, and the states


def test_what_cuts_the_sequence_in_between_cuts_it_for_nobody_else() -> None:
    """Eight positions over four ranks are two each: as twos of twos of twos they would be padded to sixteen."""
    program = check(scan_by_halves, 4, "ulysses")
    (attention,) = nodes_of(program, "spx.attention")
    assert tuple(attention.args[0].meta["val"].shape) == (2, 1, 8, 2)  # type: ignore[union-attr]


def test_small_sums_are_summed() -> None:
    """Keys and values projected to few rows, or multiplied with each other: sums cost less than an exchange."""

    def linear_attention(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
        h_BSD = attend(x_BSD @ w_DD)
        return h_BSD + h_BSD.sin() @ (h_BSD[..., :2].mT.exp() @ h_BSD).mean(-2, keepdim=True).mT

    program = check_pipeline(linear_attention, (made(1, 40, 8), made(8, 8)), {"cp": 2}, attention="ring")
    assert not remarks_of(program, "SPR108")
    assert not nodes_of(program, "spx.all_to_all")


class Products(nn.Module):
    """Keys times values, summed over all rows of both; no attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.query(x_BSD).exp() @ (self.key(x_BSD).exp().mT @ x_BSD)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("degree", [2, 3])
def test_sums_of_products_make_a_sequence(degree: int) -> None:
    """They are small beside what they are made of, as a loss is, and yet mix rows."""
    report = spcompile.verify(Products(4).double(), (made(2, 41, 4),), mesh={"cp": degree})
    assert report.ok, str(report)
    assert {remark.code for remark in report.remarks} == {"SPR109"}


class Mixer(nn.Module):
    """Tokens and channels in turn; no attention."""

    def __init__(self, length: int, width: int, entries: int) -> None:
        super().__init__()
        self.table = nn.Embedding(entries, width)
        self.tokens = nn.Sequential(nn.Linear(length, 12), nn.GELU(), nn.Linear(12, length))
        self.channels = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD = self.table(ids_BS)
        x_BSD = x_BSD + self.tokens(x_BSD.mT).mT
        return x_BSD + self.channels(x_BSD)


class Steps(nn.Module):
    """A gated recurrence over time, and a loss of all tokens."""

    def __init__(self, length: int, width: int, entries: int) -> None:
        super().__init__()
        self.table = nn.Embedding(entries, width)
        self.gates, self.head = nn.Linear(width, 2 * width), nn.Linear(width, entries)

    def forward(self, ids_BS: Tensor) -> Tensor:
        keep_BSD, new_BSD = self.gates(self.table(ids_BS)).chunk(2, -1)
        state_BD, states = torch.zeros_like(new_BSD[:, 0]), []
        for step in range(ids_BS.shape[1]):
            state_BD = keep_BSD[:, step].sigmoid() * state_BD + new_BSD[:, step]
            states.append(state_BD)
        return F.cross_entropy(self.head(torch.stack(states, 1)).flatten(0, 1), ids_BS.flatten())


@pytest.mark.thinned(8)
@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("kind", [Mixer, Steps])
def test_models_without_attention(kind: type[nn.Module], degree: int) -> None:
    """Tokens are the sequence: channels take turns with them, and entries of the batch, as many as ranks, never do."""
    model, ids_BS = kind(12, 6, 11).double(), torch.randint(0, 11, (degree, 12))
    report = spcompile.verify(model, (ids_BS,), mesh={"cp": degree})
    assert report.ok
    assert "SPR109" in {remark.code for remark in report.remarks}
    (taken,) = (remark for remark in report.remarks if remark.code == "SPR108")
    assert "a dim of 6 is split" in taken.text
    memory = spcompile.explain(model, (ids_BS,), mesh={"cp": degree}).to_dict()["memory"]
    assert memory["saved_activation_bytes"] < 1.1 * memory["saved_activation_bytes_one_device"] / degree
