"""A mesh may be given by the sizes of its axes: in compile, parallelize and broadcast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from oracle import Case, assert_same
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

import spcompile
from spcompile import models
from spcompile.diagnostics import IllegalMesh
from spcompile.machine.mesh import runtime_mesh

PoolOf = Callable[[int], WorkerPool]
GPT = partial(models.build, "gpt-tiny", layers=1)


def tokens(number: int = 0) -> dict[str, Tensor]:
    ids_BS = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(number))
    return {"ids_BS": ids_BS, "labels_BS": ids_BS}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_compile(worker_pool: PoolOf, axis: str) -> None:
    assert_same(worker_pool(2), Case(GPT, tokens, options={"mesh": {axis: 2}}))


def same_as_a_device_mesh() -> tuple[bool, bool, str]:
    given = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    found, again = (runtime_mesh({"dp": 1, "cp": 2}, "cpu") for _ in range(2))
    assert found is not None
    assert again is not None
    model = spcompile.parallelize(GPT(), {"cp": 2}, tokens(), shard_parameters="cp", compiler="eager")
    spcompile.broadcast(model, {"cp": 2})
    spread = next(model.parameters())
    return found.device_mesh == given, again.device_mesh is found.device_mesh, str(type(spread).__name__)


def test_it_is_the_mesh_of_these_sizes(worker_pool: PoolOf) -> None:
    assert worker_pool(2).run(same_as_a_device_mesh) == [(True, True, "DTensor")] * 2


def refused() -> list[str]:
    texts = []
    for mesh in ({"cp": 4}, {}, {"dp": 2, "cp": 2}):
        for call in (lambda m: runtime_mesh(m, "cpu"), lambda m: spcompile.parallelize(GPT(), m, tokens())):
            with pytest.raises(IllegalMesh) as caught:
                call(mesh)
            texts.append(str(caught.value))
    return texts


def test_sizes_that_do_not_make_up_the_world(worker_pool: PoolOf) -> None:
    ours, theirs = worker_pool(2).run(refused)
    assert ours == theirs
    assert ours[0] == ours[1]
    assert "cp=4: 4 ranks of 2 launched" in ours[0]
    assert "torchrun --nproc-per-node 4" in ours[0]
    assert "no axes: 1 rank of 2 launched" in ours[2]
