"""Axis dp where entries meet: they are gathered, and a remark says so; and where they only seem to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import data_models as dm
import plain_models as pm
import pytest
import torch
import torch.nn.functional as F
from oracle import EXACT, default_dtype
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

import spcompile
from spcompile.diagnostics import BatchNotSplit, StrictRemark


def verified(model: Callable[[], nn.Module], *inputs: Tensor, **options: Any) -> Any:
    mesh = options.pop("mesh", {"dp": 2})
    return spcompile.verify(model(), inputs, mesh=mesh, compiler="eager", tolerance=EXACT, **options)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    with default_dtype(torch.float64):
        yield


def tokens() -> tuple[Tensor, ...]:
    return (dm.states(batch=4),)


def valid() -> tuple[Tensor, ...]:
    labels_BS = pm.ids(2, 9, 4) % pm.WIDTH
    labels_BS[0, :3] = labels_BS[3] = -100
    return dm.states(batch=4), labels_BS


@pytest.mark.parametrize(("model", "inputs"), [(dm.ChosenTokens, tokens), (dm.ValidRowsOnly, valid)])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"dp": 4}, {"cp": 2, "dp": 2}], ids=str)
@pytest.mark.thinned(10)
def test_ops_over_all_tokens(model: Callable[[], nn.Module], inputs: Any, mesh: dict[str, int]) -> None:
    """Tokens that experts pick one by one each rank picks among its own; what counts all of them gathers."""
    report = verified(model, *inputs(), mesh=mesh)
    assert report.ok, str(report)
    found = [remark for remark in report.remarks if remark.code == "SPR107"]
    assert bool(found) is (model is dm.ValidRowsOnly)
    assert all("gathered over dp" in r.text and r.where.file.endswith("data_models.py") for r in found)


@pytest.mark.thinned(3)
def test_strict() -> None:
    with pytest.raises(StrictRemark, match="SPR107"):
        verified(dm.ValidRowsOnly, *valid(), strict=True)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"cp": 2}], ids=str)
def test_pictures_in_text(mesh: dict[str, int]) -> None:
    """With one entry a rank, and more patches than the text has places for."""
    text_BS, patches_PD = dm.text_with_pictures()
    report = verified(lambda: Unchecked(), text_BS, torch.cat([patches_PD, patches_PD]), mesh=mesh)
    assert report.ok, str(report)


class Unchecked(dm.PicturesInText):
    """Takes the first patches of those it is given."""

    def check(self, is_picture_BS: Tensor, patches_PD: Tensor) -> None:
        pass


class DropsWhatItSorts(pm.SelfAttention):
    """Dropout on what every rank has of all entries."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.dropout(super().forward(x).sort(0).values, 0.5).square().mean()


def test_random_numbers_for_gathered_entries_are_refused() -> None:
    with pytest.raises(BatchNotSplit, match=r"(?s)for the entries of all.*F.dropout"):
        verified(DropsWhatItSorts, *tokens())


class ScoresOfPairs(pm.SelfAttention):
    """Chosen answers in front of rejected ones, also in what it returns."""

    def forward(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        scores = super().forward(torch.cat([chosen, rejected])).mean((1, 2))
        first, second = scores.chunk(2)
        return {"loss": -F.logsigmoid(first - second).mean(), "scores": scores, "stacked": torch.stack([first, second])}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("batch", [2, 4])
def test_outputs_of_pairs(batch: int) -> None:
    report = verified(ScoresOfPairs, dm.states(0, batch=batch), dm.states(1, batch=batch))
    assert report.ok, str(report)
    assert {"scores", "stacked"} <= {row.name for row in report.rows}
    assert not report.remarks


class MeanOfStates(pm.SelfAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).square().mean()


@pytest.mark.thinned(4)
@pytest.mark.parametrize("batch", [2, 4])
def test_embeddings_with_a_gradient(batch: int) -> None:
    report = verified(MeanOfStates, dm.states(batch=batch).requires_grad_())
    assert report.ok, str(report)
    assert "input" in " ".join(row.name for row in report.rows if row.kind == "gradient")


def on_two_ranks() -> list[float]:
    """Errors of this rank's scores, of the gradient of its entries, and of a weight's, where entries are gathered."""
    with default_dtype(torch.float64):
        rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        options = {"compiler": "eager", "mesh": mesh}
        pairs, routed = ScoresOfPairs(), dm.ChosenTokens()
        chosen, rejected = dm.states(0, batch=2), dm.states(1, batch=2)
        whole = chosen.clone().requires_grad_()
        expected = pairs(whole, rejected)["scores"].unflatten(0, (2, 2))[:, rank]
        routed(whole).backward()
        wanted, weight = whole.grad, routed.gate.weight.grad
        routed.zero_grad()
        for model in (pairs, routed):
            model.compile(backend="spcompile", options=options)
        own = chosen[rank : rank + 1].clone().requires_grad_()
        found = pairs(own.detach(), rejected[rank : rank + 1])["scores"]
        routed(own).backward()
        assert wanted is not None
        assert weight is not None
        assert own.grad is not None
        assert routed.gate.weight.grad is not None
        differences = (
            found - expected,
            own.grad - wanted[rank : rank + 1],
            routed.gate.weight.grad - weight,
        )
        return [float(x.detach().abs().max()) for x in differences]


@pytest.mark.thinned(10)
def test_on_processes(worker_pool: Callable[[int], WorkerPool]) -> None:
    for errors in worker_pool(2).run(on_two_ranks):
        assert all(error <= EXACT for error in errors), errors
