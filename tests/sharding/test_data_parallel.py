"""Axis dp in the simulator: which entries are found, what is summed, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spcompile
from spcompile import models
from spcompile.diagnostics import BatchNotSplit

IGNORED = -100


class Entries(nn.Module):
    """One attention over [B, S, D], then what `end` makes of the entries."""

    def __init__(self, end: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.w_DD = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x_BSD: Tensor, weight_B: Tensor) -> Tensor:
        h_B1SD = (x_BSD @ self.w_DD).unsqueeze(1)
        y_BSD = F.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).squeeze(1)
        if self.end == "mean":
            return y_BSD.square().mean()
        if self.end == "mean of entries":
            return y_BSD.mean((0, 1)).square().sum()
        if self.end == "weighted":
            return (y_BSD.sum((1, 2)) * weight_B).sum() / weight_B.sum()
        if self.end == "weights alone":
            return y_BSD.square().sum() / weight_B.sum()
        if self.end == "between entries":
            return (y_BSD[0] * y_BSD[1]).sum()
        return y_BSD.sort(0).values.sum()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(4, 6, 4, dtype=torch.float64, generator=generator)
    return {"x_BSD": x_BSD, "weight_B": torch.rand(4, dtype=torch.float64, generator=generator)}


@pytest.mark.thinned(4, covers=["mesh"])
@pytest.mark.parametrize("end", ["mean", "mean of entries", "weighted", "weights alone"])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"cp": 3, "dp": 2}])
def test_sums_over_entries_are_sums_over_ranks(end: str, mesh: dict[str, int]) -> None:
    report = spcompile.verify(Entries(end), inputs(), mesh=mesh)
    assert report.ok, str(report)


@pytest.mark.parametrize("end", ["between entries", "sorted"])
def test_what_mixes_entries_gathers_them_and_says_so(end: str) -> None:
    report = spcompile.verify(Entries(end), inputs(), mesh={"dp": 2})
    assert report.ok, str(report)
    (remark,) = [remark for remark in report.remarks if remark.code == "SPR107"]
    assert "mixes entries of the batch" in remark.text
    assert remark.where is not None
    assert "test_data_parallel.py" in remark.where.file


class Twice(Entries):
    """Every entry twice, as for two kinds of dropout."""

    def forward(self, x_BSD: Tensor, weight_B: Tensor) -> Tensor:
        return super().forward(x_BSD.repeat(2, 1, 1), weight_B)


def test_repeated_entries() -> None:
    report = spcompile.verify(Twice("mean"), inputs(), mesh={"dp": 2})
    assert report.ok, str(report)


def test_entries_must_divide() -> None:
    with pytest.raises(BatchNotSplit, match="4 batch entries over dp = 3"):
        spcompile.verify(Entries("mean"), inputs(), mesh={"dp": 3})


@pytest.mark.thinned(4)
@pytest.mark.parametrize("model", ["llama-tiny", "bert-tiny"])
def test_ranks_with_other_numbers_of_valid_tokens(model: str) -> None:
    torch.manual_seed(0)
    ids_BS = torch.randint(0, 64, (4, 13))
    labels_BS = ids_BS.clone()
    labels_BS[:2] = IGNORED
    labels_BS[0, 5] = 3  # one valid label on the first rank
    report = spcompile.verify(
        models.build(model).double(), {"ids_BS": ids_BS, "labels_BS": labels_BS}, mesh={"dp": 2, "tp": 2, "cp": 2}
    )
    assert report.ok, str(report)


@pytest.mark.thinned(4)
def test_outputs_are_each_ranks_own_entries() -> None:
    ids_BS = torch.randint(0, 64, (4, 13))
    report = spcompile.verify(models.build("gpt-tiny").double(), {"ids_BS": ids_BS}, mesh={"dp": 2, "cp": 2})
    assert report.ok, str(report)


def test_verify_sees_a_missing_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spcompile.passes.placement.insert_reshards._complete_sums", lambda node, axis: None)
    assert not spcompile.verify(Entries("mean"), inputs(), mesh={"dp": 2}).ok


@pytest.mark.thinned(6)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_device_has_the_entries_of_all_ranks(device: str) -> None:
    with torch.device(device):
        model, ids_BS = models.build("gpt-tiny"), torch.zeros(1, 16, dtype=torch.long)
    plan = spcompile.explain(model, {"ids_BS": ids_BS, "labels_BS": ids_BS}, mesh={"dp": 2})
    assert plan.memory.saved_activation_bytes < plan.memory.saved_activation_bytes_one_device


@pytest.mark.thinned(2)
def test_under_a_default_device() -> None:
    """The frame is traced again under the modes of the call: what it makes lies on the same device."""
    model, ids_BS = models.build("llama", layers=1).double(), torch.randint(0, 50, (2, 12))
    with torch.device("cpu"):
        assert spcompile.verify(model, (ids_BS, ids_BS), {"dp": 2}).ok
        assert len(torch.overrides._get_current_function_mode_stack()) == 1
