"""Autocast inside forward, as accelerate and `bf16=True` of trainers have it, on two real processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from worker_pool import WorkerPool

from spcompile.program.observed import observed

PoolOf = Callable[[int], WorkerPool]

aten = torch.ops.aten
HALF = torch.bfloat16
PRODUCTS = (aten.mm.default, aten.addmm.default)


class Model(nn.Module):
    """A block of attention and one of features, norms in float32, logits and loss."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embed = nn.Embedding(64, 32)
        self.norm, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32, bias=False)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 64, bias=False)

    def blocks(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        q, k, v = self.qkv(self.norm(h)).view(*ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(h.shape)
        h = h + self.out(mixed)
        return h + self.down(F.gelu(self.up(self.norm2(h))))

    def loss(self, h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(h)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits

    @torch.autocast("cpu", HALF)
    def decorated(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.blocks(ids), ids)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "decorator":
            return self.decorated(ids)
        if self.form == "around":
            return self.loss(self.blocks(ids), ids)
        with torch.autocast("cpu", HALF):
            h = self.blocks(ids)
            if self.form == "context":
                return self.loss(h, ids)
            with torch.autocast("cpu", enabled=False):
                if self.form == "off inside":
                    return self.loss(h, ids)
        return self.loss(h, ids)  # a part of forward


class Counted(TorchDispatchMode):
    """The matrix products that run, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.ran[result.dtype] += 1
        return result


def step(model: nn.Module, ids: Tensor, form: str) -> dict[str, Tensor]:
    with torch.autocast("cpu", HALF, enabled=form == "around"):
        loss, logits = model(ids)
    loss.backward()
    return {"loss": loss, "logits": logits, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def run(form: str, axis: str) -> tuple[dict[str, float], tuple[Any, Any]]:
    """Errors of all outputs and gradients; the products of the plain model and of the final graphs, by dtype."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    plain, ours = Model(form), Model(form)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    ours.compile(backend="spcompile", options={"compiler": "eager", "mesh": mesh})
    with Counted() as counted:
        want = step(plain, ids, form)
    with observed() as programs:
        have = step(ours, ids, form)
    graphs = [gm for _, emission in programs for gm in emission.graphs.values()]
    found = Counter(n.meta["val"].dtype for gm in graphs for n in gm.graph.nodes if n.target in PRODUCTS)
    return {n: error(want[n].detach(), have[n].detach(), 1e-3) for n in want}, (dict(counted.ran), dict(found))


@pytest.mark.thinned(20)
@pytest.mark.parametrize(
    ("axis", "form"),
    [*(("cp", form) for form in ("context", "decorator", "part", "off inside", "around")), ("tp", "context")],
)
def test_autocast(worker_pool: PoolOf, axis: str, form: str) -> None:
    for errors, (wanted, products) in worker_pool(2).run(run, form, axis):
        assert all(found <= 2**-6 for found in errors.values()), errors
        assert products == wanted
