"""A pass from outside runs on every rank; ranks whose plugins differ are told so before anything is computed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import plain_models as pm
import pytest
import torch
import torch.distributed as dist
from oracle import error
from torch._dynamo.exc import BackendCompilerFailed
from worker_pool import WorkerPool

from spcompile.program import plugins
from spcompile.program.observed import observed

PoolOf = Callable[[int], WorkerPool]
# Negates every product twice.
SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from spcompile.graph.edit import call
from spcompile.passes_api import Pass, Stage


@dataclass(frozen=True)
class Negate(Pass):
    name: ClassVar[str] = "negate-products"
    stage: ClassVar[Stage] = Stage.GLOBAL

    def run(self, gm, ctx):
        count = 0
        for product in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            if any(user.target is torch.ops.aten.neg.default for user in product.users):
                continue
            users = list(product.users)
            once = call(gm.graph, torch.ops.aten.neg.default, (product,), like=product, before=product.next)
            twice = call(gm.graph, torch.ops.aten.neg.default, (once,), like=product, before=once.next)
            for user in users:
                user.replace_input_with(product, twice)
            count += 1
        return count


PASSES = [("recognize-loss", Negate())]
"""


def step(folder: str, comment: str) -> tuple[int, float] | str:
    """(Negations in the program, the largest error against the plain model), or what was raised."""
    own = Path(folder) / f"rank{dist.get_rank()}"
    own.mkdir()
    (own / "ranks_plugin.py").write_text(SOURCE + (comment if dist.get_rank() == 1 else ""))
    sys.path.insert(0, str(own))
    importlib.invalidate_caches()
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, model = pm.SelfAttention(), pm.SelfAttention()
    model.load_state_dict(plain.state_dict())
    x_BSD = torch.randn(2, 16, pm.WIDTH)
    model.compile(backend="spcompile", options={"plugins": ["ranks_plugin"], "compiler": "eager"})
    try:
        with observed() as programs:
            want, have = plain(x_BSD), model(x_BSD)
        for y_BSD in (want, have):
            y_BSD.square().mean().backward()
        errors = [error(want.detach(), have.detach(), 1e-30)]
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            errors.append(error(p.grad, q.grad, 1e-30))
        text = str(programs[0][0].gm.graph)
        return text.count("aten.neg.default"), max(errors)
    except BackendCompilerFailed as refused:
        return str(refused.inner_exception)
    finally:
        sys.path.remove(str(own))
        sys.modules.pop("ranks_plugin", None)
        plugins._load.cache_clear()
        plugins._loaded.clear()


@pytest.mark.thinned(3)
def test_a_plugin_runs_on_every_rank(worker_pool: PoolOf, tmp_path: Path) -> None:
    for negations, worst in worker_pool(2).run(step, str(tmp_path), ""):
        assert negations > 0
        assert worst < 1e-5


@pytest.mark.thinned(3)
def test_other_sources_on_a_rank_are_named(worker_pool: PoolOf, tmp_path: Path) -> None:
    first, second = worker_pool(2).run(step, str(tmp_path), "# another version\n")
    assert first == second
    assert first.startswith("SP201")
    assert "plugin ranks_plugin\n    rank 0: sources" in first
    assert "legal: the same plugins, of the same version, on every rank" in first
