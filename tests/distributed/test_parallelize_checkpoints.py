"""Checkpoints of parallelized models: onto another mesh, into the plain model, and into a model on meta."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracle import ADAMW, EXACT, default_dtype, error, own_loss
from refusals import refusal, same_text
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile
from spcompile import models
from spcompile.diagnostics import IllegalModel
from spcompile.parameters.safetensors_files import SafetensorsFiles

PoolOf = Callable[[int], WorkerPool]


def tokens(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, 64, (2, 16), generator=generator)
    return {"ids_BS": ids_BS, "labels_BS": ids_BS.clone()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def parallelized(model: nn.Module, sizes: dict[str, int], axis: str | None, **source: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return spcompile.parallelize(model, mesh, tokens(0), shard_parameters=axis, compiler="eager", **source)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        optimizer.zero_grad()
        own_loss(model(**tokens(number))).backward()
        optimizer.step()


def save_and_load(build: Callable[[], nn.Module], folder: str) -> dict[str, float]:
    """One step, saved; loaded with the optimizer onto another mesh and into the plain model, which go on."""
    with default_dtype(torch.float64):
        torch.manual_seed(5)
        plain = build()
        torch.manual_seed(5)
        first = parallelized(build(), {"tp": 2}, "tp")  # fused projections too
        plain_optimizer, optimizer = (torch.optim.AdamW(m.parameters(), **ADAMW) for m in (plain, first))
        steps(plain, plain_optimizer, range(1))
        steps(first, optimizer, range(1))
        dcp.save(
            {"model": first.state_dict(), "optim": get_optimizer_state_dict(first, optimizer)}, checkpoint_id=folder
        )

        torch.manual_seed(6)
        second, third = parallelized(build(), {"cp": 2}, "cp"), build()
        for model in (second, third):
            optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
            state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
            dcp.load(state, checkpoint_id=folder)
            model.load_state_dict(state["model"])
            set_optimizer_state_dict(model, optimizer, state["optim"])
            steps(model, optimizer, range(1, 3))
        steps(plain, plain_optimizer, range(1, 3))

        with torch.device("meta"):
            empty = build()
        fourth = parallelized(empty, {"tp": 2}, None, checkpoint=folder)
        found = {"another mesh": (second, plain), "the plain model": (third, plain), "meta": (fourth, first)}
        return {
            f"{name} in {case}": error(whole(want.detach()), whole(have.detach()))
            for case, (loaded, expected) in found.items()
            for (name, have), want in zip(loaded.named_parameters(), expected.parameters(), strict=True)
        }


@pytest.mark.thinned(30)
@pytest.mark.parametrize("model", ["gpt-tiny", "llama-tiny"])
def test_saved_on_one_mesh_and_loaded_elsewhere(worker_pool: PoolOf, model: str, tmp_path: Path) -> None:
    for errors in worker_pool(2).run(save_and_load, partial(models.build, model, layers=1), str(tmp_path / "saved")):
        assert not {name: e for name, e in errors.items() if not e <= EXACT}


def from_safetensors(build: Callable[[], nn.Module], file: str) -> dict[str, float]:
    with default_dtype(torch.float64):
        want = torch.load(f"{file}.pt")
        with torch.device("meta"):
            empty = build()
        loaded = parallelized(empty, {"tp": 2}, None, checkpoint=file)
        return {name: error(want[name], whole(x)) for name, x in loaded.state_dict().items()}


@pytest.mark.thinned(7)
@pytest.mark.parametrize("model", ["gpt-tiny", "llama-tiny"])
def test_parts_are_read_from_safetensors(worker_pool: PoolOf, model: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = str(tmp_path / "model.safetensors")
    with default_dtype(torch.float64):
        plain = models.build(model)
    torch.save(plain.state_dict(), f"{file}.pt")
    named = {name: x.detach() for name, x in plain.named_parameters()}  # without the tied names, as they are saved
    safetensors.save_file(named, file)
    for errors in worker_pool(2).run(from_safetensors, partial(models.build, model), file):
        assert not {name: e for name, e in errors.items() if e != 0.0}


def refused_load(build: Callable[[], nn.Module], file: str, trouble: str) -> str:
    """What ranks are told where rank 1 alone has trouble with a checkpoint."""
    with torch.device("meta"):
        empty = build()
    is_mine = dist.get_rank() == 1
    changed = {
        "before": ("require", lambda *_: (_ for _ in ()).throw(IllegalModel("cannot be looked at"))),
        "during": ("fill", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))),
        "": ("require", SafetensorsFiles.require),
    }[trouble if is_mine else ""]
    with mock.patch.object(SafetensorsFiles, *changed):
        text = refusal(lambda: parallelized(empty, {"tp": 2}, None, checkpoint=file))
    if trouble == "before":
        assert all(p.is_meta for p in empty.parameters())  # nothing of the model was changed
    return text


@pytest.mark.thinned(7)
@pytest.mark.parametrize(
    ("trouble", "word"), [("before", "cannot be looked at"), ("during", "Input/output error"), ("", "are NaN in")]
)
def test_a_failure_on_one_rank_reaches_all(worker_pool: PoolOf, tmp_path: Path, trouble: str, word: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    file = str(tmp_path / "model.safetensors")
    named = {name: x.detach() for name, x in models.build("gpt-tiny").named_parameters()}
    if not trouble:
        next(x for x in named.values() if x.ndim == 2)[-1] = float("nan")  # in the part of one rank
    safetensors.save_file(named, file)
    text = same_text(worker_pool(2).run(refused_load, partial(models.build, "gpt-tiny"), file, trouble, timeout=90.0))
    assert text.startswith("SP105 illegal model: ")
    assert word in text


def damaged_dcp(build: Callable[[], nn.Module], folder: str) -> str:
    with torch.device("meta"):
        empty = build()
    return refusal(lambda: parallelized(empty, {"tp": 2}, None, checkpoint=folder))


@pytest.mark.thinned(4)
def test_damaged_data_of_dcp(worker_pool: PoolOf, tmp_path: Path) -> None:
    dcp.save(models.build("gpt-tiny").state_dict(), checkpoint_id=tmp_path / "saved", no_dist=True)
    (data,) = (tmp_path / "saved").glob("*.distcp")
    data.write_bytes(bytes(data.stat().st_size))
    text = same_text(
        worker_pool(2).run(damaged_dcp, partial(models.build, "gpt-tiny"), str(tmp_path / "saved"), timeout=90.0)
    )
    assert text.startswith(f"SP105 illegal model: '{tmp_path / 'saved'}': ")
