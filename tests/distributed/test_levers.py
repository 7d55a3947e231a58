"""All levers of a plan of memory at once on real processes: a step of training is that of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from lever_searches import every
from memory_models import D, Decoder
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

from spcompile.memory import planner
from spcompile.memory.planner import MemoryPlan
from spcompile.program import partition
from spcompile.program.observed import observed

LENGTH, HOST = 101, 10**9
Outcome = tuple[set[str], dict[str, float]]  # levers that the plan used, errors by tensor


def in_stages(whole: MemoryPlan, staged: MemoryPlan, least: bool) -> MemoryPlan:
    return staged


def one_step(axis: str, attention: str, groups: int = 0) -> Outcome:
    """Of one rank: the loss, gradients, and parameters behind a step of AdamW, beside those of the plain model."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    torch.manual_seed(0)
    plain = Decoder(layers=3).double()
    x_BSD = torch.randn(1, LENGTH, D, dtype=torch.float64)
    model = copy.deepcopy(plain)
    options = {"compiler": "eager", "memory": "min", "host_memory": HOST, "outputs": "loss", "attention": attention}
    options |= {"passes": {"split-all-to-alls": {"groups": groups}}} if groups else {}
    model.compile(backend="spcompile", options={"mesh": mesh, **options})
    losses = []
    staged = mock.patch.object(partition, "cheaper_plan", in_stages)
    with mock.patch.object(planner, "best_of_all", every), staged, observed() as programs:
        for one in (plain, model):
            optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-4)
            loss = one(x_BSD)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    plan = programs[-1][1].memory
    assert plan is not None
    used = {"recompute": plan.trades, "host": plan.away, "tiles": plan.tiles, "stages": plan.stages}
    pairs = {"loss": (losses[1], losses[0])}
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert expected.grad is not None
        pairs |= {f"gradient of {name}": (p.grad, expected.grad), name: (p.detach(), expected.detach())}
    errors = {name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for name, (a, b) in pairs.items()}
    return {name for name, lever in used.items() if lever}, errors


@pytest.mark.parametrize(
    ("axis", "attention", "groups"), [("cp", "ring", 0), ("cp", "ulysses", 0), ("cp", "ulysses", 2), ("tp", "auto", 0)]
)
@pytest.mark.thinned(30)
def test_a_step_under_all_levers(
    worker_pool: Callable[[int], WorkerPool], axis: str, attention: str, groups: int
) -> None:
    for used, errors in worker_pool(2).run(one_step, axis, attention, groups):
        assert used == {"recompute", "host", "tiles"} | ({"stages"} if groups else set())
        assert max(errors.values()) < 1e-10, sorted(errors.items(), key=lambda row: -row[1])[:5]
