"""A program from the cache computes what the plain model does, on every rank, and only where all ranks have it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import plain_models as pm
import torch
import torch.distributed as dist
from oracle import error
from torch.distributed.device_mesh import DeviceMesh
from worker_pool import WorkerPool

from spcompile import program_cache
from spcompile.backend import PROGRAMS

PoolOf = Callable[[int], WorkerPool]


def step(**options: Any) -> tuple[bool, float]:
    """(Whether this process compiled, the largest error of output and gradients against the plain model)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, model = pm.SelfAttention(), pm.SelfAttention()
    model.load_state_dict(plain.state_dict())
    model.compile(backend="spcompile", options=options)
    before = len(PROGRAMS)
    x_BSD = torch.randn(2, 33, pm.WIDTH)
    want, have = plain(x_BSD), model(x_BSD)
    for y_BSD in (want, have):
        y_BSD.square().mean().backward()
    errors = [error(want.detach(), have.detach(), 1e-30)]
    parameters = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        q = parameters[name]
        assert p.grad is not None
        assert q.grad is not None
        errors.append(error(p.grad, q.grad, 1e-30))
    return len(PROGRAMS) > before, max(errors)


def steps(folder: str) -> dict[str, tuple[bool, float]]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    backwards = DeviceMesh("cpu", [1, 0], mesh_dim_names=("cp",))
    try:
        with torch._functorch.config.patch(enable_autograd_cache=True):
            found = {"cold": step(), "warm": step()}
            with mock.patch.object(program_cache, "load", missing_on_rank_1(program_cache.load)):
                found["one rank has it"] = step()
            found["warm again"] = step()
            found["other options"] = step(attention="ring", balance="contiguous")
            found["warm, options"] = step(attention="ring", balance="contiguous")
            found["other ranks"] = step(mesh=backwards)
            found["warm, ranks"] = step(mesh=backwards)
            return found
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def missing_on_rank_1(load: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda key: load(key) if dist.get_rank() == 0 else None


def test_output_and_gradients(worker_pool: PoolOf, tmp_path: Path) -> None:
    for found in worker_pool(2).run(steps, str(tmp_path), timeout=600):
        compiled = {name for name, (one, _) in found.items() if one}
        assert compiled >= {"cold", "one rank has it", "other options"}
        assert not compiled & {"warm", "warm again", "warm, options", "warm, ranks"}
        assert max(e for _, e in found.values()) < 1e-4, found
