"""Attention that stays written out is split by its query rows, wherever these are and whatever reads the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile import explain, verify

S, N, H = 9, 4, 4
MIXED = torch.linspace(-1, 1, N * N, dtype=torch.float64).view(N, N).sin()


class Written(nn.Module):
    """Projections [B, S, N, H], then `attend`."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.Linear(N * H, 3 * N * H, dtype=torch.float64)
        self.out = nn.Linear(N * H, N * H, dtype=torch.float64)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x).unflatten(-1, (3, N, H)).unbind(2)
        return self.out(self.attend(q, k, v).flatten(2)).square().mean()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q.transpose(1, 2) @ k.transpose(1, 2).mT / 2


def weights(q: Tensor, k: Tensor) -> Tensor:
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~keep, float("-inf")).softmax(-1)


def back(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "heads behind rows": lambda q, k, v: torch.einsum(
        "bsht,bthd->bshd", torch.einsum("bshd,bthd->bsht", q, k).softmax(-1), v
    ),
    "one key for all heads": lambda q, k, v: torch.einsum(
        "bsht,btd->bshd", torch.einsum("bshd,btd->bsht", q, k[:, :, 0]).softmax(-1), v[:, :, 0]
    ),
    "talking heads": lambda q, k, v: back(
        torch.einsum("nm,bmst->bnst", torch.eye(N).double(), weights(q, k)) @ v.transpose(1, 2)
    ),
    "talking heads before the softmax too": lambda q, k, v: back(
        torch.einsum("nm,bmst->bnst", MIXED, torch.einsum("bnst,nm->bmst", scores(q, k), MIXED).softmax(-1))
        @ v.transpose(1, 2)
    ),
    "talking heads by convolutions": lambda q, k, v: back(
        F.conv2d(F.conv2d(scores(q, k), MIXED[..., None, None]).softmax(-1), MIXED.T[..., None, None])
        @ v.transpose(1, 2)
    ),
    "a mask of heads": lambda q, k, v: back(weights(q, k) * torch.ones(N, 1, 1).double() @ v.transpose(1, 2)),
    "difference of two": lambda q, k, v: (
        lambda w: back((w[:, :2] - w[:, 2:] / 2).repeat(1, 2, 1, 1) @ v.transpose(1, 2))
    )(weights(q, k)),
}


@pytest.mark.thinned(30)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_split_by_query_rows(name: str) -> None:
    model, x = Written(ATTENTIONS[name]), torch.randn(2, S, N * H, dtype=torch.float64)
    report = verify(model, {"x": x}, mesh={"cp": 2})
    assert report.ok, str(report)
    codes = {remark.code for remark in report.remarks}
    assert "SPR202" in codes
    assert "SPR101" not in codes
    assert explain(model, {"x": x}, mesh={"cp": 2}).sharding.length == S


@pytest.mark.thinned(8)
def test_activations_between_blocks_are_split_over_tp() -> None:
    """The sequence is that of the query rows, also where no attention was read."""
    model = nn.Sequential(*(_Block(ATTENTIONS["a mask of heads"]) for _ in range(2)))
    batch = {"input": torch.randn(2, S, N * H, dtype=torch.float64)}
    report = verify(model, batch, mesh={"tp": 2})
    assert report.ok, str(report)
    ops = {row.op for row in explain(model, batch, mesh={"tp": 2}).collectives}
    assert "reduce_scatter" in ops


class _Block(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.written = nn.LayerNorm(N * H, dtype=torch.float64), Written(attend)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.written.heads(self.norm(x)).unflatten(-1, (3, N, H)).unbind(2)
        return x + self.written.out(self.written.attend(q, k, v).flatten(2))


@pytest.mark.thinned(7)
@pytest.mark.parametrize("entries", [1, 2], ids=["one entry a rank", "two entries a rank"])
def test_each_rank_of_dp_has_its_entries(entries: int) -> None:
    report = verify(
        Written(ATTENTIONS["talking heads"]), {"x": torch.randn(2 * entries, S, N * H).double()}, mesh={"dp": 2}
    )
    assert report.ok, str(report)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    states = (k.exp()[..., None] * v[..., None, :]).cumsum(1)
    return (q.exp()[..., None, :] @ states)[..., 0, :]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("entries", [1, 2], ids=["one entry a rank", "two entries a rank"])
def test_entries_of_a_model_without_softmax(entries: int) -> None:
    x = torch.randn(2 * entries, S, N * H, dtype=torch.float64)
    report = verify(Written(linear_attention), {"x": x}, mesh={"dp": 2})
    assert report.ok, str(report)
