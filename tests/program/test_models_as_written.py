"""Spellings that once broke the compile: every gradient of every rank against the plain model, in one process.

B batch, S sequence, T keys of another sequence, D width, N heads, H head width.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spcompile import explain, verify

WIDTH, HEADS = 16, 2


def heads(x_BSD: Tensor) -> Tensor:
    return x_BSD.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention, and attention to `other` where it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x_BSD: Tensor, mask: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        other = x_BSD if other is None else other
        q, k, v = heads(self.query(x_BSD)), heads(self.key(other)), heads(self.value(other))
        y_BNSH = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y_BNSH.transpose(1, 2).flatten(2))


class WritesToDropout(nn.Module):
    """The residual is added in place to what dropout gave."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.drop, self.norm = Attention(), nn.Dropout(0.1), nn.LayerNorm(WIDTH)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h = self.drop(self.attention(x_BSD))
        h += x_BSD
        return self.norm(h).square().mean()


class WritesByMask(nn.Module):
    """Rows of a weight are written where a buffer of bools is true."""

    def __init__(self, accumulate: bool) -> None:
        super().__init__()
        self.attention, self.update, self.accumulate = Attention(), nn.Parameter(torch.randn(10, WIDTH)), accumulate
        self.register_buffer("marked", torch.arange(WIDTH) % 8 < 5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        full = self.update.new_ones(WIDTH, WIDTH)
        if self.accumulate:
            full = full.index_put((self.marked,), self.update, accumulate=True)
        else:
            full[self.marked] = self.update
            full[~self.marked] = 0.5
        return self.attention(x_BSD @ full).square().mean()


class MaskOfEachHead(nn.Module):
    """A key mask in numbers, repeated for each head and viewed as [B, N, 1, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x_BSD: Tensor, other_BTD: Tensor, valid_BT: Tensor) -> Tensor:
        mask = ((1 - valid_BT) * -10000.0).unsqueeze(1).repeat_interleave(HEADS, dim=0)
        mask = mask.view(len(x_BSD), HEADS, -1, valid_BT.shape[1])
        return self.attention(x_BSD, mask, other_BTD).square().mean()


class MixedByNumbers(nn.Module):
    """A parameter of one dim is contracted with what it mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mix = Attention(), nn.Parameter(torch.randn(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return torch.einsum("n,nbsd->bsd", self.mix, torch.stack([x_BSD, self.attention(x_BSD)])).square().mean()


class TwoSequences(nn.Module):
    """Two sequences of other lengths through one encoder, each reduced over its valid tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def encode(self, x_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        h = x_BSD + self.attention(x_BSD, valid_BS[:, None, None].bool().expand(-1, 1, x_BSD.shape[1], -1))
        h = self.norm(h + self.down(F.gelu(self.up(h))))
        return (h * valid_BS[..., None]).sum(1) / valid_BS.sum(1, keepdim=True)

    def forward(self, x_BSD: Tensor, y_BTD: Tensor, x_valid_BS: Tensor, y_valid_BT: Tensor) -> Tensor:
        return (self.encode(x_BSD, x_valid_BS) - self.encode(y_BTD, y_valid_BT)).square().mean()


class WidthOne(nn.Module):
    """An MLP of convolutions over one position each, between norms by known statistics of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.BatchNorm1d(WIDTH)
        self.up, self.down = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(2 * WIDTH, WIDTH, 1, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BDS = (x_BSD + self.attention(x_BSD)).mT
        return (h_BDS + self.down(F.gelu(self.up(self.norm(h_BDS))))).square().mean()


def tokens(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def valid(length: int) -> Tensor:
    return (torch.arange(length) < torch.tensor([[length], [length - 3]])).double()


class Recurrent(nn.Module):
    """A recurrent layer in front of the attention, and a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.attention = nn.GRU(WIDTH, WIDTH, batch_first=True), Attention()

    def forward(self, x_BSD: Tensor) -> Tensor:
        h, _ = self.recurrent(x_BSD)
        warnings.warn("half of it is done", stacklevel=1)
        return self.attention(h).square().mean()


CASES: dict[str, tuple[Any, list[Tensor]]] = {
    "writes to dropout": (WritesToDropout, [tokens(9)]),
    "writes to dropout, eval": (lambda: WritesToDropout().eval(), [tokens(9)]),
    "writes by mask": (lambda: WritesByMask(False), [tokens(9)]),
    "adds by mask": (lambda: WritesByMask(True), [tokens(9)]),
    "mask of each head": (MaskOfEachHead, [tokens(9), tokens(7), valid(7)]),
    "mixed by numbers": (MixedByNumbers, [tokens(9)]),
    "width one": (lambda: WidthOne().eval(), [tokens(9)]),
    "recurrent": (Recurrent, [tokens(9)]),
    "two sequences": (TwoSequences, [tokens(9), tokens(14), valid(9), valid(14)]),
}
MESHES = ({"cp": 2}, {"tp": 2}, {"tp": 2, "cp": 2})


@pytest.mark.filterwarnings("ignore:half of it is done")
@pytest.mark.thinned(3, covers=["mesh"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_gradient(case: str, mesh: dict[str, int]) -> None:
    build, inputs = CASES[case]
    report = verify(build().double(), inputs, mesh)
    assert report.ok, report


@pytest.mark.thinned(3)
def test_convolutions_of_width_one_stay_split() -> None:
    plan = explain(WidthOne().eval(), [tokens(16).float()], {"cp": 2})
    assert 2 * plan.memory.saved_activation_bytes == plan.memory.saved_activation_bytes_one_device
    assert not [remark for remark in plan.remarks if remark.code in ("SPR102", "SPR103")]


@pytest.mark.thinned(3)
def test_a_recurrent_layer_is_computed_whole_with_a_remark() -> None:
    plan = explain(Recurrent(), [tokens(8).float()], {"cp": 2})
    (remark,) = (remark for remark in plan.remarks if remark.code == "SPR102")
    assert "aten.gru.input has no sharding rule" in remark.text


class Result(dict[str, Tensor]):
    """A container that its library registered without names of its parts, as that of diffusers."""


def parts(found: Result) -> tuple[list[Tensor], list[str]]:
    return list(found.values()), list(found)


pytree.register_pytree_node(Result, parts, lambda values, names: Result(zip(names, values, strict=True)))


class ReturnsResult(Attention):
    def forward(self, x_BSD: Tensor) -> Result:  # type: ignore[override]
        return Result(sample=super().forward(x_BSD))


def test_outputs_in_a_container_without_names() -> None:
    report = verify(ReturnsResult().double(), [tokens(9)], {"cp": 2})
    assert report.ok, report
    assert "output 0" in {row.name for row in report.rows}


class Averages(Attention):
    """A buffer holds a running mean, which the forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(WIDTH))

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        self.mean.mul_(0.9).add_(x_BSD.detach().mean((0, 1)), alpha=0.1)
        return (super().forward(x_BSD) * self.mean).square().mean()


def test_final_graphs_are_compared_where_a_buffer_is_updated() -> None:
    report = verify(Averages().double(), [tokens(9)], {"cp": 2})
    assert report.ok, report
    assert {row.graph for row in report.rows} == {"local", "final"}


class Caches(Attention):
    """A table in a buffer, and beside it how much of it is filled; a list of what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(32, WIDTH), persistent=False)
        self.filled, self.asked = 0, [0]

    def positions(self, length: int) -> Tensor:
        if length > self.filled:
            at = torch.arange(length, dtype=self.table.dtype)
            self.table[:length] = torch.outer(at, torch.arange(1.0, WIDTH + 1, dtype=at.dtype) / WIDTH).sin()
            self.filled = length
            self.asked[0] = length
        return self.table[:length]

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_BSD + self.positions(x_BSD.shape[1])).square().mean()


@pytest.mark.thinned(3)
def test_what_a_model_caches_is_put_back() -> None:
    model = Caches().double()
    for _ in range(2):
        report = verify(model, [tokens(9)], {"cp": 2})
        assert report.ok, report
        assert (model.filled, model.asked, int(model.table.count_nonzero())) == (0, [0], 0)
