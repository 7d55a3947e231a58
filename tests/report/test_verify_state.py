"""What a model keeps: `verify` compares it, and leaves it as it was."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcompile import verify
from spcompile.report.put_back import put_back
from tests.report.test_verify import Sabotage, broken_pipeline

F64 = torch.float64
aten = torch.ops.aten


class Keeping(nn.Module):
    """One attention; a running mean that is another tensor each time, a counter and a weight that are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(8, 24, dtype=F64)
        self.norm = nn.BatchNorm1d(8, dtype=F64)
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("mean", torch.ones(8, dtype=F64))
        self.register_buffer("pairs", torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.steps[1] += 1
        self.mean = self.mean * 0.9 + x.detach().mean((0, 1)) * 0.1
        self.heads.bias.data.mul_(0.5)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.heads(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()


KEPT = {"steps", "mean", "heads.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}], ids=str)
def test_new_values_are_compared(mesh: dict[str, int]) -> None:
    model = Keeping()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    mean = model.mean
    report = verify(model, (torch.randn(2, 9, 8, dtype=F64),), mesh=mesh)
    assert report.ok, str(report)
    for graph in ("local", "final"):
        assert {row.name for row in report.rows if row.kind == "new value" and row.graph == graph} == KEPT
    assert model.mean is mean
    assert all(torch.equal(x.to_dense(), before[name].to_dense()) for name, x in model.state_dict().items())


def less(node: Any) -> None:
    node.args = (node.args[0], 0.8)


@pytest.mark.thinned(4)
def test_a_wrong_new_value_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients do not show it."""
    broken_pipeline(monkeypatch, "recognize-loss", Sabotage(aten.mul.Tensor, less))
    report = verify(Keeping(), (torch.randn(2, 9, 8, dtype=F64),), mesh={"cp": 2})
    assert {(row.kind, row.name) for row in report.rows if not row.ok} == {("new value", "mean")}
    assert report.culprit is not None
    assert report.culprit.pass_name == "sabotage"


class Filled:
    """No module, but a module holds it."""

    def __init__(self) -> None:
        self.length = 0
        self.tables: dict[str, list[Tensor]] = {"k": []}


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.held = Filled()
        self.recent = deque([1], maxlen=4)
        self.scratch = torch.zeros(2)  # no buffer
        self.held.tables["v"] = [self.scratch]

    def change(self, given: list[int]) -> None:
        self.held.length = 5
        self.held.tables["k"].append(torch.ones(1))
        self.held.tables["more"] = []
        self.recent.append(2)
        self.scratch += 1
        self.later = self.held
        given.append(3)


def test_all_that_a_module_holds_is_put_back() -> None:
    holder, given = Holder(), [1]
    with put_back(holder, given):
        holder.change(given)
    assert holder.held.length == 0
    assert list(holder.held.tables) == ["k", "v"]
    assert holder.held.tables["k"] == []
    assert list(holder.recent) == [1]
    assert holder.scratch.tolist() == [0, 0]
    assert not hasattr(holder, "later")
    assert given == [1]
