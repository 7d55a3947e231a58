"""Batches of which every part stands behind the other: over dp each rank has its entries of every part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plain_models as pm
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import TracingContext

import spcompile
from spcompile.diagnostics import BatchNotSplit
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program.trace import compile_for, through_dynamo
from spcompile.program.whole_batch import over_whole_batch

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


@pytest.mark.thinned(30)
@pytest.mark.parametrize("entries", [1, 2], ids=["one entry a rank", "two entries a rank"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, entries: int) -> None:
    report = spcompile.verify(Preferences(PAIRS[name]).double(), inputs(2 * entries, 2), mesh={"dp": 2})
    assert report.ok, str(report)
    assert not report.remarks


@pytest.mark.thinned(10)
@pytest.mark.parametrize("entries", [1, 2], ids=["one entry a rank", "two entries a rank"])
def test_blocks_of_blocks(entries: int) -> None:
    model = Preferences(lambda x, n: (x[:n], *x[n:].chunk(2))).double()
    report = spcompile.verify(model, inputs(2 * entries, 3), mesh={"dp": 2, "cp": 2})
    assert report.ok, str(report)


JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "joined twice": lambda z: torch.cat([torch.cat([z, z.tanh()]), z * 2])[len(z) :],
    "a part with more entries": lambda z: torch.cat([z.repeat(2, 1), z * 2])[: 2 * len(z)],
    "behind the sequence": lambda z: torch.cat([z.T, z.T * 2], 1)[:, len(z) :],
    "beside what all ranks hold": lambda z: torch.cat([z.sum(1), torch.ones(len(z), dtype=z.dtype)]),
}


class Joined(Preferences):
    """The logarithms of one answer, of which `cut` makes something."""

    def forward(self, ids: Tensor, reference: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (pm.HEADS, -1)).transpose(1, 2) for t in self.qkv(self.embedding(ids)).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.cut(self.head(x).sum(-1), len(ids)).square().exp().mean() * reference.mean()


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", JOINS)
def test_joins(name: str) -> None:
    (ids,), reference = inputs(4, 1)
    report = spcompile.verify(Joined(lambda z, _: JOINS[name](z)).double(), (ids, reference), mesh={"dp": 2})
    assert report.ok, str(report)


@pytest.mark.thinned(2)
def test_groups_that_several_ranks_share_are_refused() -> None:
    model = Joined(lambda z, n: z.view(2, -1).mean(1)).double()
    (ids,), reference = inputs(8, 1)
    with pytest.raises(BatchNotSplit, match="2 groups of entries over dp = 4"):
        spcompile.verify(model, (ids, reference), mesh={"dp": 4})


@pytest.mark.thinned(10)
def test_a_symbol_tells_whole_groups() -> None:
    """Each rank's entries are pairs, whatever their number: the model itself asks for that of its own."""
    found: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
        compile_for(gm, inputs, MeshShape.of({"dp": 2}), Options(), PIPELINE)
        found.extend(x for x in inputs if isinstance(x, torch.SymInt))
        guards = TracingContext.get().fake_mode.shape_env.guards
        assert any(str(guard.expr).startswith("Eq(Mod(") for guard in guards)

    (ids,), reference = inputs(4, 1)
    for x in (ids, reference):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    model = Joined(lambda z, n: z.sum(1).view(-1, 2).mean(1)).double()
    through_dynamo(model, (ids, reference), over_whole_batch(backend, 2))
    assert found


@pytest.mark.thinned(3)
def test_a_cut_inside_of_a_block_gathers() -> None:
    model = Preferences(lambda x, n: (x[1 : n + 1], x[:n])).double()
    report = spcompile.verify(model, inputs(4, 2), mesh={"dp": 2})
    assert report.ok, str(report)
    assert any("aten.slice.Tensor mixes entries of the batch" in remark.text for remark in report.remarks)
