"""Products that hide their collectives, on gloo processes: all of them, also those that do not pay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

from spcompile.collectives.pipelined_matmuls import PIPELINED, all_gather_matmul, matmul_reduce_scatter
from spcompile.program.observed import observed

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


def against_plain(compiler: str, lengths: tuple[int, ...], batch: int) -> tuple[float, list[str]]:
    """The largest difference of losses and gradients to the plain model, and the ops that ran.

    Several lengths are one program for all of them.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Blocks().double()
    compiled: Any = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    passes = {"pipeline-matmuls": {"min_gain": -math.inf}}
    compiled.compile(backend="spcompile", options={"mesh": mesh, "compiler": compiler, "passes": passes})
    pairs: list[tuple[Any, ...]] = []
    with observed() as programs:
        for length in lengths:
            x_BSD = torch.randn(batch, length, 8, dtype=torch.float64)
            if len(lengths) > 1:
                torch._dynamo.mark_dynamic(x_BSD, 1)
            losses = [model(x_BSD) for model in (plain, compiled)]
            for loss in losses:
                loss.backward()
            pairs.append(tuple(losses))
    ((_, emission),) = programs
    pairs += [(a.grad, b.grad) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True)]
    ops = [str(n.target._opname) for gm in emission.graphs.values() for n in gm.graph.nodes if n.target in PIPELINED]
    return max(float((a - b).abs().max()) for a, b in pairs), sorted(ops)


SLOW = (pytest.mark.slow, pytest.mark.thinned(4))


@pytest.mark.thinned(10)
@pytest.mark.parametrize(
    ("ranks", "compiler", "lengths", "batch"),
    [
        (2, "eager", (7,), 2),
        pytest.param(2, "inductor", (8, 7, 13), 2, marks=SLOW),
        pytest.param(2, "inductor", (8,), 1, marks=SLOW),
        pytest.param(4, "eager", (7, 8, 13), 1, marks=SLOW),
        pytest.param(4, "inductor", (7,), 2, marks=SLOW),
    ],
)
def test_loss_and_gradients(
    worker_pool: PoolOf, ranks: int, compiler: str, lengths: tuple[int, ...], batch: int
) -> None:
    for error, ops in worker_pool(ranks).run(against_plain, compiler, lengths, batch):
        assert error < 1e-12
        assert {"all_gather_matmul", "matmul_reduce_scatter"} == set(ops)


def on_symmetric_memory(batch: int) -> list[float]:
    """Both ops in chunks, and by torch's operators, whose stand-ins for tests serve the CPU here."""
    degree, name = dist.get_world_size(), dist.group.WORLD.group_name  # type: ignore[union-attr]
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symmetric_memory._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symmetric_memory._fused_matmul_reduce_scatter_fallback, "CPU")
    x, weights = torch.randn(batch, 4, 6), [torch.randn(6, 5), torch.randn(2, 6).t()]
    rows, weight = torch.randn(batch * 4 * degree, 3), torch.randn(3, 6)
    errors = []
    for gathered in (True, False):
        call = x, weights, 1, 4 * degree, name, degree, gathered
        for a, b in zip(all_gather_matmul(*call, True), all_gather_matmul(*call), strict=True):
            assert a.shape == b.shape
            assert a.is_contiguous()
            errors.append(float((a - b).abs().max()))
    for operand in (rows, rows.t().contiguous().t()):
        call = [operand], [weight], [batch, 4 * degree, 6], 1, name, degree
        a, b = matmul_reduce_scatter(*call, True), matmul_reduce_scatter(*call)
        assert a.shape == b.shape
        errors.append(float((a - b).abs().max()))
    return errors


@pytest.mark.parametrize("batch", [1, 2])
def test_symmetric_memory_does_the_same(worker_pool: PoolOf, batch: int) -> None:
    for errors in worker_pool(2).run(on_symmetric_memory, batch):
        assert max(errors) < 1e-5
