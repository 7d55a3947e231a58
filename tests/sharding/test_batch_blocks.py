"""Batches of which every part stands behind the other: over dp each rank has its entries of every part."""

from __future__ import annotations

from collections.abc import Callable

import plain_models as pm
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile

PAIRS: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "slices": lambda x, n: (x[:n], x[n:]),
    "from the end": lambda x, n: (x[:-n], x[-n:]),
    "chunk": lambda x, n: x.chunk(2),
    "split": lambda x, n: x.split(n),
    "sizes": lambda x, n: x.split([n, n]),
    "indices": lambda x, n: x.tensor_split([n]),
    "view": lambda x, n: tuple(x.view(2, -1, x.shape[1])),
}


class Preferences(nn.Module):
    """One forward over several answers to each prompt, of which `cut` takes the batch apart again."""

    def __init__(self, cut: Callable[[Tensor, int], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.cut = cut
        self.embedding = nn.Embedding(pm.VOCAB, pm.WIDTH)
        self.qkv = nn.Linear(pm.WIDTH, 3 * pm.WIDTH)
        self.head = nn.Linear(pm.WIDTH, pm.VOCAB)

    def forward(self, answers: list[Tensor], reference: Tensor) -> Tensor:
        ids = torch.cat(answers, 0)
        x = self.embedding(ids)
        q, k, v = (t.unflatten(-1, (pm.HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logs = self.head(x)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        first, *others = (part.sum(-1) for part in self.cut(logs, len(reference)))
        return -F.logsigmoid(first - sum(others) - reference).mean()


def inputs(entries: int, answers: int) -> tuple[list[Tensor], Tensor]:
    return [torch.randint(0, pm.VOCAB, (entries, 9)) for _ in range(answers)], torch.randn(entries, dtype=torch.float64)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("entries", [1, 2], ids=["one entry a rank", "two entries a rank"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, entries: int) -> None:
    report = spcompile.verify(Preferences(PAIRS[name]).double(), inputs(2 * entries, 2), mesh={"dp": 2})
    assert report.ok, str(report)
    assert not report.remarks


@pytest.mark.thinned(7)
@pytest.mark.parametrize("entries", [1, 2], ids=["one entry a rank", "two entries a rank"])
def test_blocks_of_blocks(entries: int) -> None:
    model = Preferences(lambda x, n: (x[:n], *x[n:].chunk(2))).double()
    report = spcompile.verify(model, inputs(2 * entries, 3), mesh={"dp": 2, "cp": 2})
    assert report.ok, str(report)


def test_a_cut_inside_of_a_block_gathers() -> None:
    model = Preferences(lambda x, n: (x[1 : n + 1], x[:n])).double()
    report = spcompile.verify(model, inputs(4, 2), mesh={"dp": 2})
    assert report.ok, str(report)
    assert any("aten.slice.Tensor mixes entries of the batch" in remark.text for remark in report.remarks)
