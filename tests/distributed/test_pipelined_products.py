"""Products that hide their collectives, on gloo processes: all of them, also those that do not pay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

from spcompile.backend import PROGRAMS
from spcompile.pipelined_products import PIPELINED

PoolOf = Callable[[int], WorkerPool]


class Block(nn.Module):
    """Attention over positions, and an MLP whose products read what is gathered and give what is scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_B1SD = x_BSD.unsqueeze(1)
        h_BSD = nn.functional.scaled_dot_product_attention(x_B1SD, x_B1SD, x_B1SD, is_causal=True).squeeze(1)
        h_BSD = self.norm(h_BSD)
        return x_BSD + self.norm(self.down(self.gate(h_BSD).sigmoid() * self.up(h_BSD)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x_BSD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return x_BSD.square().mean()


def against_plain(compiler: str, length: int, batch: int) -> tuple[float, list[str]]:
    """The largest difference of loss and gradients to the plain model, and the ops that ran."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Blocks().double()
    compiled: Any = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    passes = {"pipeline-products": {"min_gain": -math.inf}}
    compiled.compile(backend="spcompile", options={"mesh": mesh, "compiler": compiler, "passes": passes})
    x_BSD = torch.randn(batch, length, 8, dtype=torch.float64)
    losses = []
    for model in (plain, compiled):
        loss = model(x_BSD)
        loss.backward()
        losses.append(loss.detach())
    pairs = [tuple(losses), *((a.grad, b.grad) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))]
    graphs = PROGRAMS[-1][1].graphs.values()
    ops = [str(n.target._opname) for gm in graphs for n in gm.graph.nodes if n.target in PIPELINED]
    return max(float((a - b).abs().max()) for a, b in pairs), sorted(ops)


@pytest.mark.parametrize(
    ("ranks", "compiler", "length", "batch"),
    [
        (2, "eager", 7, 2),
        (2, "inductor", 8, 1),
        pytest.param(4, "eager", 7, 1, marks=pytest.mark.slow),
        pytest.param(4, "inductor", 7, 2, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients(worker_pool: PoolOf, ranks: int, compiler: str, length: int, batch: int) -> None:
    for error, ops in worker_pool(ranks).run(against_plain, compiler, length, batch):
        assert error < 1e-12
        assert {"all_gather_matmul", "matmul_reduce_scatter"} == set(ops)
