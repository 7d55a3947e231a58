"""A program from the cache computes what the plain model does, on every rank, and only where all ranks have it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from oracle import error
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from worker_pool import WorkerPool

import spcompile
from spcompile.program import program_cache
from spcompile.program.observed import observed

PoolOf = Callable[[int], WorkerPool]


def step(shard: str | None = None, **options: Any) -> tuple[bool, float]:
    """(Whether this process compiled, the largest error of output and gradients against the plain model).

    shard: the axis over which `parallelize` shards the parameters.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, model = pm.SelfAttention(), pm.SelfAttention()
    model.load_state_dict(plain.state_dict())
    x_BSD = torch.randn(2, 33, pm.WIDTH)
    if shard is None:
        model.compile(backend="spcompile", options=options)
    else:
        spcompile.parallelize(model, options.pop("mesh"), (x_BSD,), shard_parameters=shard, **options)
    with observed() as programs:
        want, have = plain(x_BSD), model(x_BSD)
        for y_BSD in (want, have):
            y_BSD.square().mean().backward()
    errors = [error(want.detach(), have.detach(), 1e-30)]
    parameters = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        q = parameters[name]
        assert p.grad is not None
        assert q.grad is not None
        grad = q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad
        errors.append(error(p.grad, grad, 1e-30))
    return bool(programs), max(errors)


@contextlib.contextmanager
def caching(folder: str) -> Iterator[None]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    try:
        with torch._functorch.config.patch(enable_autograd_cache=True):
            yield
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def missing_on_rank_1(load: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    return lambda key, coordinate: load(key, coordinate) if dist.get_rank() == 0 else None


def again(folder: str) -> dict[str, tuple[bool, float]]:
    with caching(folder):
        found = {"cold": step(), "warm": step()}
        with mock.patch.object(program_cache, "load", missing_on_rank_1(program_cache.load)):
            found["one rank has it"] = step()
        return {**found, "warm again": step()}


def changed(folder: str) -> dict[str, tuple[bool, float]]:
    other = {"attention": "ring", "balance": "contiguous"}
    backwards = {"mesh": DeviceMesh("cpu", [1, 0], mesh_dim_names=("cp",))}
    with caching(folder):
        found = {"cold": step(), "other options": step(**other), "warm, options": step(**other)}
        return {**found, "other ranks": step(**backwards), "warm, ranks": step(**backwards)}


def sharded(folder: str, sizes: dict[str, int], options: dict[str, Any]) -> dict[str, tuple[bool, float]]:
    """Parameters in parts over cp, twice, then whole ones."""
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    with caching(folder):
        found = {name: step(shard="cp", mesh=mesh, **options) for name in ("cold", "warm")}
        return {**found, "whole": step(mesh=mesh, **options)}


def dumping(folder: str) -> tuple[bool, float]:
    with caching(folder):
        return step(**({"dump": str(Path(folder) / "graphs")} if dist.get_rank() == 0 else {}))


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_one_rank_dumps_and_none_stores(worker_pool: PoolOf, tmp_path: Path) -> None:
    for compiled, largest in worker_pool(2).run(dumping, str(tmp_path)):
        assert compiled
        assert largest < 1e-4
    assert not (tmp_path / "spcompile").exists()


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_only_a_program_that_all_ranks_have_is_not_compiled(worker_pool: PoolOf, tmp_path: Path) -> None:
    for found in worker_pool(2).run(again, str(tmp_path)):
        assert {name for name, (one, _) in found.items() if one} == {"cold", "one rank has it"}
        assert max(e for _, e in found.values()) < 1e-4, found


@pytest.mark.slow
@pytest.mark.thinned(3)
def test_other_options_and_other_ranks(worker_pool: PoolOf, tmp_path: Path) -> None:
    for found in worker_pool(2).run(changed, str(tmp_path)):
        compiled = {name for name, (one, _) in found.items() if one}
        assert compiled >= {"cold", "other options"}
        assert not compiled & {"warm, options", "warm, ranks"}
        assert max(e for _, e in found.values()) < 1e-4, found


@pytest.mark.manual
@pytest.mark.parametrize(
    ("sizes", "options"),
    [({"cp": 4}, {"attention": {"ulysses": 2, "ring": 2}}), ({"cp": 2}, {}), ({"tp": 2, "cp": 2}, {})],
    ids=str,
)
def test_sharded_parameters_and_parts_of_axes(
    worker_pool: PoolOf, tmp_path: Path, sizes: dict[str, int], options: dict[str, Any]
) -> None:
    for found in worker_pool(math.prod(sizes.values())).run(sharded, str(tmp_path), sizes, options):
        assert {name for name, (one, _) in found.items() if one} == {"cold", "whole"}
        assert max(e for _, e in found.values()) < 1e-4, found
