"""All levers of a plan of memory at once on real processes: a step of training is that of the plain model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from lever_searches import every
from memory_models import D, Decoder
from oracle import error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile
from spcompile.memory import planner
from spcompile.memory.planner import MemoryPlan
from spcompile.program import partition
from spcompile.program.observed import observed

LENGTH, HOST = 101, 10**9
ROUNDED = 0.02  # two units of bfloat16: tiles add gradients up in float32
Outcome = tuple[set[str], dict[str, float]]  # levers that the plan used, errors by tensor


def in_stages(whole: MemoryPlan, staged: MemoryPlan, least: bool) -> MemoryPlan:
    return staged


@dataclass(frozen=True)
class Setting:
    """A mesh and how attention and parameters are split on it.

    groups: of heads, which run in stages. autocast: in bfloat16, where what is expected is what the same program gives
    without any lever.
    """

    mesh: Mapping[str, int]
    attention: Any = "auto"
    groups: int = 0
    shard_parameters: str | None = None
    autocast: bool = False


SETTINGS = {
    "ring": Setting({"cp": 2}, "ring"),
    "ulysses": Setting({"cp": 2}, "ulysses"),
    "stages": Setting({"cp": 2}, "ulysses", groups=2),
    "tp": Setting({"tp": 2}),
    "ring under ZeRO-3": Setting({"cp": 2}, "ring", shard_parameters="cp"),
    "stages under ZeRO-3": Setting({"cp": 2}, "ulysses", groups=2, shard_parameters="cp"),
    "ring under autocast": Setting({"cp": 2}, "ring", autocast=True),
    "tp under autocast": Setting({"tp": 2}, autocast=True),
    "tp x cp": Setting({"tp": 2, "cp": 2}, "ring"),
    "hybrid": Setting({"cp": 4}, {"ulysses": 2, "ring": 2}),
}


def one_step(setting: Setting) -> Outcome:
    """Of one rank: the loss, gradients, and parameters behind a step of AdamW, beside those of the plain model."""
    mesh = init_device_mesh("cpu", tuple(setting.mesh.values()), mesh_dim_names=tuple(setting.mesh))
    torch.manual_seed(0)
    dtype = torch.float32 if setting.autocast else torch.float64
    plain = Decoder(layers=3).to(dtype)
    x_BSD = torch.randn(1, LENGTH, D, dtype=dtype)
    options = {"compiler": "eager", "outputs": "loss", "attention": setting.attention}
    options |= {"passes": {"split-all-to-alls": {"groups": setting.groups}}} if setting.groups else {}

    def compiled(**memory: Any) -> nn.Module:
        model, split = copy.deepcopy(plain), setting.shard_parameters
        if split is not None:
            return spcompile.parallelize(model, mesh, (x_BSD,), shard_parameters=split, **options, **memory)
        model.compile(backend="spcompile", options={"mesh": mesh, **options, **memory})
        return model

    without = compiled(memory="speed") if setting.autocast else copy.deepcopy(plain)
    expected = step(without, x_BSD, setting.autocast)
    staged = mock.patch.object(partition, "cheaper_plan", in_stages)
    with mock.patch.object(planner, "best_of_all", every), staged, observed() as programs:
        found = step(compiled(memory="min", host_memory=HOST), x_BSD, setting.autocast)
    plan = programs[-1][1].memory
    assert plan is not None
    used = {"recompute": plan.trades, "host": plan.away, "tiles": plan.tiles, "stages": plan.stages}
    errors = {name: error(x, found[name], 1e-3) for name, x in expected.items()}
    return {name for name, lever in used.items() if lever}, errors


def step(model: nn.Module, x_BSD: Tensor, autocast: bool) -> dict[str, Tensor]:
    """What it leaves, by name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x_BSD)
    loss.backward()
    optimizer.step()
    found = {"loss": loss.detach()}
    for name, p in model.named_parameters():
        assert p.grad is not None
        found |= {f"gradient of {name}": whole(p.grad), name: whole(p.detach())}
    return found


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.thinned(20)
def test_a_step_under_all_levers(worker_pool: Callable[[int], WorkerPool], name: str) -> None:
    setting = SETTINGS[name]
    ranks = math.prod(setting.mesh.values())
    for used, errors in worker_pool(ranks).run(one_step, setting):
        assert used == {"recompute", "host", "tiles"} | ({"stages"} if setting.groups else set())
        worst = sorted(errors.items(), key=lambda row: -row[1])[:5]
        assert worst[0][1] < (ROUNDED if setting.autocast else 1e-10), worst
