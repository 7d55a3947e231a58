"""on_graph_break="gather" on two processes: parts by both axes, with whole outputs and with the loss only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import broken_models as bm
import data_models as dm
import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from oracle import EXACT, Case, Outcome, compare, default_dtype
from refusals import compiled, refusal, remarks, same_text
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile

PoolOf = Callable[[int], WorkerPool]


def batch(number: int, *, length: int = 9) -> dict[str, Tensor]:
    return {"x": dm.states(number, length)}


def on_axis(case: Case, axis: str, **options: Any) -> Outcome:
    options |= {"mesh": init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))}
    return compare(Case(case.build, case.inputs, options={**options, "on_graph_break": "gather"}, micro_batches=(0, 1)))


@pytest.mark.parametrize("axis", ["cp", "tp"])
@pytest.mark.parametrize("build", [bm.BranchesOnValues, bm.BranchesInLoop, bm.BrokenInside])
@pytest.mark.thinned(30)
def test_two_ranks(worker_pool: PoolOf, build: Any, axis: str) -> None:
    outcomes = worker_pool(2).run(on_axis, Case(partial(build), batch), axis)
    for outcome in outcomes:
        assert all(error <= EXACT for error in outcome.errors.values()), outcome.worst()
    assert outcomes[0].graphs == outcomes[1].graphs
    assert outcomes[0].remarks.count("SPR105") >= 2


def warned(build: Callable[[], Any], axis: str) -> list[str] | str:
    """What is logged as a warning in a call, or the text of its error."""
    model: Any = build()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    model.compile(backend="spcompile", options={"mesh": mesh, "compiler": "eager", "on_graph_break": "gather"})
    if axis == "dp":
        return refusal(lambda: model(batch(0)["x"]))
    with remarks() as texts:
        model(batch(0)["x"])
        model(batch(0)["x"])
    return texts


class NotCompiled(bm.BranchesOnValues):
    """Dynamo is told not to compile it, but what it calls: that is no break."""

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.first(x).square().mean()}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("axis", ["dp", "cp"])
def test_only_graphs_of_a_model_that_breaks_are_no_plain_code(worker_pool: PoolOf, axis: str) -> None:
    pool = worker_pool(2)
    codes = ["SP301", "SP301", "SP305"] if axis == "dp" else ["", "", "SPR403"]
    for build, code in zip((bm.BranchesOnValues, bm.BranchesInLoop, NotCompiled), codes, strict=True):
        for found in pool.run(warned, build, axis):
            assert (found if isinstance(found, str) else "".join(text[:6] for text in found[:1])).startswith(code)
            assert code or not found


def loss_only() -> list[float]:
    """Differences of the loss and of the largest gradient where only the last part has the option."""
    with default_dtype(torch.float64):
        x = batch(0)["x"]
        plain, model = bm.BrokenInside(), bm.BrokenInside()
        model.load_state_dict(plain.state_dict())
        compiled(model, outputs="loss", on_graph_break="gather")
        losses = plain(x), model(x)
        for loss in losses:
            loss.backward()
        pairs = zip(plain.parameters(), model.parameters(), strict=True)
        return [
            abs(float(losses[0] - losses[1])),
            max(float((p.grad - q.grad).abs().max()) for p, q in pairs),  # type: ignore[operator]
        ]


def sharded_parameters() -> list[float]:
    with default_dtype(torch.float64):
        x = batch(0)["x"]
        plain, model = bm.BranchesOnValues(), bm.BranchesOnValues()
        model.load_state_dict(plain.state_dict())
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        spcompile.parallelize(model, mesh, (x,), shard_parameters="tp", compiler="eager", on_graph_break="gather")
        losses = plain(x)["loss"], model(x)["loss"]
        for loss in losses:
            loss.backward()
        found: list[float] = [abs(float(losses[0] - losses[1]))]
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert isinstance(q.grad, DTensor)
            found.append(float((p.grad - q.grad.full_tensor()).abs().max()))
        return found


@pytest.mark.thinned(23)
@pytest.mark.parametrize("run", [loss_only, sharded_parameters])
def test_other_ways_to_use_them(worker_pool: PoolOf, run: Callable[[], list[float]]) -> None:
    for found in worker_pool(2).run(run):
        assert all(error <= EXACT for error in found), found


def takes_another_branch() -> str:
    """Rank 1 is told to behave otherwise in the code between two parts."""
    model: Any = bm.BranchesOnValues()
    if dist.get_rank():
        model.between = pm.SelfAttention()
    compiled(model, on_graph_break="gather")
    return refusal(lambda: model(batch(0)["x"]))


def breaks_in_a_loop() -> str:
    model = compiled(bm.BranchesInLoop())
    return refusal(lambda: model(batch(0)["x"]))


@pytest.mark.thinned(3)
def test_ranks_that_differ_behind_a_break(worker_pool: PoolOf) -> None:
    text = same_text(worker_pool(2).run(takes_another_branch))
    assert text.startswith("SP201"), text


def test_a_loop_is_refused_before_any_of_it_runs(worker_pool: PoolOf) -> None:
    text = same_text(worker_pool(2).run(breaks_in_a_loop))
    assert text.startswith("SP301"), text
    assert "if x.max() > 1:" in text
