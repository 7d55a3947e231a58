"""What a sharded model saves is what the plain model would: it loads in one process, and onto another mesh."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
import torch.distributed as dist
from oracle import own_loss
from torch import Tensor
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile

PoolOf = Callable[[int], WorkerPool]


def equal(want: dict[str, Tensor], have: dict[str, Any]) -> bool:
    whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in have.items()}
    return want.keys() == whole.keys() and all(torch.equal(want[name], x) for name, x in whole.items())


def saved_and_loaded(kind: str, axis: str) -> dict[str, bool]:
    """A trained step, saved, and loaded with transformers, with the plain model, and onto a mesh of the other axis."""
    torch.manual_seed(0)
    plain = hf_models.build(kind)
    torch.manual_seed(0)
    model: Any = hf_models.build(kind)
    batch = hf_models.inputs(0, model=kind, kind="plain")
    spcompile.parallelize(model, {axis: 2}, batch, shard_parameters=axis, compiler="eager")
    with torch.no_grad():
        for p in (*plain.parameters(), *model.parameters()):
            p.mul_(1.5)
    names = [tempfile.mkdtemp(prefix="spcompile-saved-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    folder, state = Path(names[0]), spcompile.full_state_dict(model)
    model.save_pretrained(folder)
    dist.barrier()
    want, again = plain.state_dict(), type(plain).from_pretrained(folder)
    with torch.device("meta"):
        empty = hf_models.build(kind)
    other = "tp" if axis == "cp" else "cp"
    there: Any = spcompile.parallelize(empty, {other: 2}, batch, checkpoint=folder, compiler="eager")
    found = {
        "gathered": equal(want, state) if dist.get_rank() == 0 else state == {},
        "files": sorted(f.name for f in folder.glob("*.safetensors")) == ["model.safetensors"],
        "loaded": equal(want, again.state_dict()),
        "on another mesh": equal(want, there.state_dict()),
        "runs": bool(torch.isclose(own_loss(there(**batch)), own_loss(plain(**batch)))),
        "its class": type(model).__name__ == type(plain).__name__,
    }
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    return found


@pytest.mark.thinned(30)
@pytest.mark.parametrize(("kind", "axis"), [("llama", "cp"), ("gpt2", "tp"), ("bert", "cp")])
def test_saved_whole(worker_pool: PoolOf, kind: str, axis: str) -> None:
    for found in worker_pool(2).run(saved_and_loaded, kind, axis):
        assert all(found.values()), found
