"""The strategies for Lightning and Fabric on a stand-in of its interface: they are tested where it is absent, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import prod
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from lightning_standin import Metric, standing_in
from oracle import FLOAT32
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from trainer_runs import Rows, ddp_does_not_crash, labelled, worst
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]


class Wrapped(nn.Module):
    """What a LightningModule is to a strategy."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.tokens = Metric()

    def training_step(self, batch: Any, at: int) -> Any:
        return self.inner(**batch).loss


def steps(module: nn.Module, step: Callable[[Any, int], Any], sampler: dict[str, int], rows: int) -> dict[str, Any]:
    """Five steps, each of the rows that a sampler gives to this process."""
    data = Rows(5 * rows * sampler["num_replicas"])
    loader = DataLoader(data, rows, sampler=DistributedSampler(data, shuffle=False, **sampler), collate_fn=labelled)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)
    found: dict[str, Any] = {"loss": [], "norm": []}
    for at, batch in zip(range(5), loader, strict=False):
        found["loss"].append(float(step(batch, at)))
        found["norm"].append(float(nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: p.detach().clone() for name, p in module.named_parameters()}


def compare(kind: str, mesh: dict[str, int]) -> dict[str, float]:
    model, batches = hf_models.build("llama", layers=1), mesh.get("dp", 1)
    plain = Wrapped(copy.deepcopy(model))

    def alone(batch: Any, at: int) -> Any:
        loss = plain.training_step(batch, at)
        loss.backward()
        return loss.detach()

    want = steps(plain, alone, {"num_replicas": 1, "rank": 0}, 2 * batches)
    if dist.get_rank() > 0:  # the first rank's weights become those of all
        model.requires_grad_(False).apply(lambda part: [p.zero_() for p in part.parameters()])
        model.requires_grad_(True)
    with standing_in() as ours, ddp_does_not_crash():
        given = {"mesh": mesh, "spcompile_options": {"compiler": "eager"}}
        if kind == "Trainer":
            strategy = ours.SequenceParallelStrategy(**given)
            module = Wrapped(model)
            strategy.setup_environment()
            strategy.connect(module)
            strategy.setup(None)
            forward, mean = strategy.training_step, strategy.reduce
            once = module.tokens.process_group if batches > 1 else not module.tokens.distributed_available_fn()
            assert once
        else:
            strategy = ours.SequenceParallelFabricStrategy(**given)
            strategy.setup_environment()
            module = Wrapped(model)
            prepared = strategy.setup_module(model)
            mean = strategy.all_reduce
            with strategy._backward_sync_control.no_backward_sync(prepared, enabled=batches == 1):
                pass

            def forward(batch: Any, at: int) -> Any:
                return prepared(**batch).loss

        def step(batch: Any, at: int) -> Any:
            loss = forward(batch, at)
            loss.backward()
            return mean(loss.detach().clone())

        have = steps(module, step, strategy.distributed_sampler_kwargs, 2)
        assert len(strategy.all_gather(torch.ones(2))) == batches
        assert strategy.reduce_boolean_decision(dist.get_rank() == 0, all=False)
        assert not strategy.reduce_boolean_decision(dist.get_rank() == 0)
    return worst(want, have)


@pytest.mark.slow
@pytest.mark.thinned(10)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"dp": 2, "cp": 2}], ids=str)
@pytest.mark.parametrize("kind", ["Trainer", "Fabric"])
def test_as_in_one_process(worker_pool: PoolOf, kind: str, mesh: dict[str, int]) -> None:
    for errors in worker_pool(prod(mesh.values())).run(compare, kind, mesh):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad
        assert len(errors) > 12
