"""A loss without logits on real processes: the sequence split over cp, the vocabulary over tp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import EXACT, Case, Outcome, compare
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from worker_pool import WorkerPool

PoolOf = Callable[[int], WorkerPool]
B, S, D, C = 2, 13, 8, 1001


class Decoder(nn.Module):
    """One attention and a head whose weight is the embedding's; classes and tokens that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.qkv, self.norm = nn.Embedding(C, D), nn.Linear(D, 3 * D), nn.LayerNorm(D)

    def forward(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x_BSD = self.tokens(ids_BS)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x_BSD).chunk(3, -1))
        y_BSD = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits_BSC = 5 * torch.tanh(F.linear(self.norm(x_BSD + y_BSD), self.tokens.weight) / 5)
        return F.cross_entropy(logits_BSC[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), label_smoothing=0.1)


def tokens(number: int) -> dict[str, Tensor]:
    ids_BS = torch.randint(0, C, (B, S), generator=torch.Generator().manual_seed(number))
    labels_BS = ids_BS.clone()
    labels_BS[0, :9] = -100
    return {"ids_BS": ids_BS, "labels_BS": labels_BS}


def largest_allocation(model: nn.Module) -> int:
    """Bytes of the largest block that the allocator gave out in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**tokens(0)).backward()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def on_axis(axis: str) -> tuple[Outcome, int, int]:
    """What one rank found, and the largest allocations of a step of the plain model and of the compiled one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    options: dict[str, Any] = {"mesh": mesh, "compiler": "eager"}
    outcome = compare(Case(Decoder, tokens, options=options))
    plain, model = Decoder(), Decoder()
    model.compile(backend="spcompile", options=options)
    model(**tokens(0)).backward()
    return outcome, largest_allocation(plain), largest_allocation(model)


@pytest.mark.thinned(15)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_two_ranks(worker_pool: PoolOf, axis: str) -> None:
    found = worker_pool(2).run(on_axis, axis)
    for outcome, plain, own in found:
        assert all(error <= EXACT for error in outcome.errors.values()), outcome.worst()
        assert outcome.graphs == found[0][0].graphs
        assert outcome.graphs
        assert plain >= B * (S - 1) * C * 4
        assert own < B * (S - 1) * C * 4 / 2
