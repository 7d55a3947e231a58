"""Models that exec made, as in a notebook or a generator of models: Dynamo finds no lines of theirs."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from torch import nn

from spcompile import explain, verify

SOURCE = """
import torch
from torch import nn
import torch.nn.functional as F

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 16, dtype=torch.float64)
        self.norm = nn.LayerNorm(16, dtype=torch.float64)
        self.heads = nn.Linear(16, 48, dtype=torch.float64)
        self.head = nn.Linear(16, 13, dtype=torch.float64)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, ids):
        self.steps.add_(1)
        x = self.embed(ids)
        q, k, v = self.heads(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        keep = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & (ids != 0)[:, None, None, :]
        weights = (q @ k.mT / 8**0.5).masked_fill(~keep, float("-inf")).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2)
        x = x + x.logcumsumexp(1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())
"""
CELL = "<ipython-input-3-0a1b2c>"


def model_of(file: str) -> nn.Module:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(SOURCE, file, "exec"), names)
    return names["Model"]()


@pytest.mark.thinned(30)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"tp": 2, "cp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("file", ["<string>", CELL])
def test_every_stage_takes_nodes_without_lines(file: str, mesh: dict[str, int]) -> None:
    """The verifier of graphs wants a line of each node, or to know where it comes from."""
    report = verify(model_of(file), (torch.randint(1, 13, (4, 9)),), mesh=mesh)
    assert report.ok, str(report)


@pytest.mark.thinned(3)
def test_a_cell_of_a_notebook_has_lines() -> None:
    linecache.cache[CELL] = (len(SOURCE), None, SOURCE.splitlines(True), CELL)
    try:
        plan = explain(model_of(CELL), (torch.randint(1, 13, (2, 9)),), mesh={"cp": 2})
    finally:
        del linecache.cache[CELL]
    (remark,) = (remark for remark in plan.remarks if remark.code == "SPR108")
    assert remark.where is not None
    assert remark.where.file == CELL
    assert remark.where.text == "x = x + x.logcumsumexp(1)"
