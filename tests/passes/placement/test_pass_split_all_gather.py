"""split-all-gather: which gathers become another split first, that ranks stay right, and what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from mixing_models import Attends, Averages, ChannelsFirst, NormOfHeads, words
from torch import Tensor, nn

import spcompile


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 3}, {"tp": 2, "cp": 2}, {"tp": 3, "cp": 2}], ids=str)
@pytest.mark.parametrize("kind", [NormOfHeads, ChannelsFirst])
@pytest.mark.thinned(3, covers=["kind"])
def test_rows_of_any_number(kind: type[nn.Module], mesh: Mapping[str, int]) -> None:
    torch.manual_seed(0)
    model, (ids_BS,) = words(kind(8), kind(8), length=11)
    report = spcompile.verify(model.double(), (ids_BS,), mesh)
    assert report.ok, str(report)


class Heads(nn.Module):
    """Heads of attention, and what `end` reads of all of them."""

    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.end = end

    def forward(self, x_BNSH: Tensor) -> Tensor:
        return self.end(F.scaled_dot_product_attention(x_BNSH, x_BNSH, x_BNSH).transpose(1, 2).flatten(2))


class Returned(nn.Module):
    """Nothing but another shape of the heads."""

    def forward(self, y_BSD: Tensor) -> Tensor:
        return y_BSD.transpose(1, 2)


class Whole(nn.Module):
    """A call that no rank can run on rows."""

    def forward(self, y_BSD: Tensor) -> Tensor:
        return y_BSD.flatten(1).sort(1)[0]


def changes(end: nn.Module) -> list[str]:
    """The changes of state of values behind attention, behind cancel-collectives."""
    torch._dynamo.reset()
    plan = spcompile.explain(Heads(end), (torch.randn(2, 4, 7, 2, requires_grad=True),), {"tp": 2})
    lines = plan.graph("cancel-collectives").split("spx.attention")[1].splitlines()
    return [line.rpartition("# ")[2] for line in lines if " = reshard(" in line]


def test_a_norm_runs_on_rows() -> None:
    assert changes(nn.Sequential(nn.LayerNorm(8), nn.GELU())) == ["all_to_all", "all_gather"]


@pytest.mark.parametrize("end", [Returned, Whole])
def test_nothing_is_sent_twice_for_no_work(end: type[nn.Module]) -> None:
    assert changes(end()) == ["all_gather"]


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 3}, {"tp": 2, "cp": 2}], ids=str)
@pytest.mark.thinned(29)
def test_a_transform_along_the_sequence_runs_on_features(mesh: Mapping[str, int]) -> None:
    torch.manual_seed(0)
    model, (ids_BS,) = words(Attends(8), Averages(8), length=11)
    report = spcompile.verify(model.double(), (ids_BS,), mesh)
    assert report.ok, str(report)
    torch._dynamo.reset()
    text = spcompile.explain(model, (ids_BS,), mesh).graph("cancel-collectives")
    (line,) = (line for line in text.splitlines() if "aten.fft_irfft" in line)
    assert ("cp" in mesh) or "tp=S(2)" in line
