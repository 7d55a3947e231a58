"""Lightning and Fabric over a mesh against the same in one process; `dev` does not install lightning."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from oracle import FLOAT32
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from trainer_runs import Rows, ddp_does_not_crash, labelled, launched, shared_folder, worst
from worker_pool import WorkerPool

from spcompile.diagnostics import SpcompileError

pytest.importorskip("lightning")
PoolOf = Callable[[int], WorkerPool]
EAGER = {"compiler": "eager"}


def module_around(model: nn.Module, *, frozen: bool = False) -> Any:
    """A LightningModule that logs what it does, and holds metrics."""
    import lightning
    import torchmetrics

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.tokens = torchmetrics.SumMetric()
            self.found: dict[str, list[float]] = {"loss": [], "norm": [], "firsts": []}
            if frozen:
                self.other = nn.Linear(2, 2)

        def training_step(self, batch: Any, at: int) -> Any:
            loss = self.inner(**batch).loss
            self.log("summed", loss.detach(), sync_dist=True, reduce_fx="sum", on_epoch=True, on_step=False)
            self.found["firsts"].append(float(batch["input_ids"][0, 0]))
            mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
            self.found["loss"].append(float(mean))
            return loss

        def validation_step(self, batch: Any, at: int) -> None:
            self.log("val_loss", self.inner(**batch).loss, sync_dist=True)
            self.tokens(batch["labels"].ne(-100).sum())
            self.log("tokens", self.tokens)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.found["norm"].append(float(nn.utils.get_total_norm(grads)))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-4)

    return Module()


def no_processes() -> bool:
    return False


def trainer_of(folder: str, strategy: Any, devices: int, **settings: Any) -> Any:
    import lightning

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    made: dict[str, Any] = {"max_epochs": 1, "gradient_clip_val": 1.0, "num_sanity_val_steps": 1}
    made |= {"default_root_dir": folder, "accelerator": "cpu", "devices": devices, "strategy": strategy}
    return lightning.Trainer(**(quiet | made | settings))


def fitted(trainer: Any, module: Any, rows: int, rows_of_step: int) -> dict[str, Any]:
    counts = 5 * trainer.accumulate_grad_batches, 2
    data = [Rows(count * rows_of_step) for count in counts]
    # Where there are several processes, Lightning shuffles what is trained on, by such a sampler.
    alone = {"sampler": DistributedSampler(data[0], num_replicas=1, rank=0)} if trainer.world_size == 1 else {}
    loaders = [
        DataLoader(part, rows, collate_fn=labelled, **given) for part, given in zip(data, (alone, {}), strict=True)
    ]
    trainer.fit(module, *loaders)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.validate(module, loaders[1], verbose=False)
    figures["validated"] = float(trainer.callback_metrics["val_loss"])
    return module.found | figures | {name: p.detach().clone() for name, p in module.named_parameters()}


def compare_fit(mesh: dict[str, int], settings: dict[str, Any]) -> dict[str, float]:
    from spcompile.integrations.lightning import SequenceParallelStrategy

    model, batches, folder = hf_models.build("llama", layers=1), mesh.get("dp", 1), shared_folder()
    with launched(1):
        one = trainer_of(folder, "auto", 1, enable_checkpointing=False, **settings)
        alone = module_around(copy.deepcopy(model))
        alone.tokens.distributed_available_fn = no_processes  # the ranks of this test are there
        plain = fitted(one, alone, 2 * batches, 2 * batches)
    ranks = dist.get_world_size()
    with launched(ranks), ddp_does_not_crash():
        if dist.get_rank() > 0:
            torch.nn.init.zeros_(model.lm_head.weight)  # the first rank's weights become those of all
        strategy = SequenceParallelStrategy(mesh=mesh, spcompile_options=EAGER)
        trainer = trainer_of(os.path.join(folder, "ours"), strategy, ranks, **settings)
        module = module_around(model)
        ours = fitted(trainer, module, 2, 2 * batches)
        trainer.strategy.barrier()
        saved = sorted(Path(folder, "ours").rglob("*.ckpt"))
        assert len(saved) == 1, saved
        state = torch.load(saved[0], weights_only=False)["state_dict"]
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())
        again = trainer_of(folder, SequenceParallelStrategy(mesh=mesh, spcompile_options=EAGER), ranks)
        resumed = module_around(copy.deepcopy(hf_models.build("llama", layers=1)))
        again.fit(resumed, DataLoader(Rows(24), 2, collate_fn=labelled), ckpt_path=str(saved[0]))
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in state.items())
    firsts = [None] * ranks
    dist.all_gather_object(firsts, ours.pop("firsts"))
    plain.pop("firsts")
    assert len({str(found) for found in firsts}) == batches
    return worst(plain, ours)


@pytest.mark.slow
@pytest.mark.thinned(2)
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"tp": 2}, {"dp": 2, "cp": 2}], ids=str)
def test_trainer_as_in_one_process(worker_pool: PoolOf, mesh: dict[str, int], settings: dict[str, Any]) -> None:
    for errors in worker_pool(prod(mesh.values())).run(compare_fit, mesh, settings):
        if "dp" in mesh:  # a sum of means over all batches has twice as many terms
            errors.pop("summed")
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad
        assert {"loss", "norm", "val_loss", "tokens", "validated"} <= set(errors)


def fabric_loop(fabric: Any, model: Any, rows: int, rows_of_step: int) -> dict[str, Any]:
    """Five steps, of two micro-batches each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    module, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(Rows(10 * rows_of_step), rows, collate_fn=labelled))
    found: dict[str, Any] = {"loss": [], "norm": []}
    for at, batch in enumerate(loader):
        with fabric.no_backward_sync(module, enabled=at % 2 == 0 and fabric.world_size > 1):
            loss = module(**batch).loss
            fabric.backward(loss / 2)
        found["loss"].append(float(fabric.all_reduce(loss.detach().clone())))
        if at % 2:
            found["norm"].append(float(fabric.clip_gradients(module, optimizer, max_norm=1.0)))
            optimizer.step()
            optimizer.zero_grad()
    found["labels"] = fabric.all_gather(batch["labels"]).flatten(0, -2)
    return found | {name: p.detach().clone() for name, p in model.named_parameters()}


def compare_fabric(mesh: dict[str, int]) -> dict[str, float]:
    import lightning

    from spcompile.integrations.lightning import SequenceParallelFabricStrategy

    model, batches = hf_models.build("llama", layers=1), mesh.get("dp", 1)
    with launched(1):
        want = fabric_loop(
            lightning.Fabric(accelerator="cpu", devices=1), copy.deepcopy(model), 2 * batches, 2 * batches
        )
    ranks = dist.get_world_size()
    with launched(ranks), ddp_does_not_crash():
        strategy = SequenceParallelFabricStrategy(mesh=mesh, spcompile_options=EAGER)
        fabric = lightning.Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
        fabric.launch()
        have = fabric_loop(fabric, model, 2, 2 * batches)
        folder = shared_folder()
        fabric.save(os.path.join(folder, "model.ckpt"), {"model": model})
        assert os.listdir(folder) == ["model.ckpt"]
    if batches > 1:  # one process reads the rows of a step in order
        want.pop("labels")
    return worst(want, have)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"cp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_fabric_as_in_one_process(worker_pool: PoolOf, mesh: dict[str, int]) -> None:
    for errors in worker_pool(prod(mesh.values())).run(compare_fabric, mesh):
        bad = {name: error for name, error in errors.items() if not error <= FLOAT32}
        assert not bad, bad


def refusals() -> list[str]:
    from spcompile.integrations.lightning import SequenceParallelStrategy

    model = hf_models.build("bert", layers=1)
    compiled = copy.deepcopy(model)
    compiled.compile()
    cases: list[tuple[Any, dict[str, Any]]] = [
        (module_around(model, frozen=True), {}),
        (module_around(model), {"submodules": ("head",)}),
        (module_around(compiled), {}),
        (torch.compile(module_around(model)), {}),
        (module_around(model), {"mesh": {"cp": 3}}),
        (module_around(model), {"spcompile_options": {"atention": "ring"}}),
    ]
    texts = []
    for module, given in cases:
        loader = DataLoader(Rows(2), 2, collate_fn=labelled)
        with launched(2):
            trainer = trainer_of(shared_folder(), SequenceParallelStrategy(**({"mesh": {"cp": 2}} | given)), 2)
            with pytest.raises(SpcompileError) as caught:
                trainer.fit(module, loader)
        texts.append(str(caught.value))
    return texts


@pytest.mark.slow
@pytest.mark.thinned(2)
def test_what_is_refused(worker_pool: PoolOf) -> None:
    ours, theirs = worker_pool(2).run(refusals)
    assert ours == theirs
    words = ["submodules= out of 'inner', 'other'", "no 'head'", "compiled already", "torch.compile has wrapped"]
    for word, text in zip([*words, "SP103", "did you mean 'attention'"], ours, strict=True):
        assert word in text, text
