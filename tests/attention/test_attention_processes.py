"""spx::ring_attention between real processes on gloo, with torch's own checks of collectives switched on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from worker_pool import WorkerPool

from spcompile.attention.op import attention, ring_attention
from spcompile.attention.ring import hops as _hops  # noqa: F401  (defines spx::ring_hops)
from spcompile.collectives.counting import count_collectives
from spcompile.diagnostics import RanksDisagree
from spcompile.machine import sequence

CASES = [
    ("causal", "zigzag", 65, 65),
    ("causal", "contiguous", 7, 7),
    ("causal window=9", "contiguous", 64, 64),
    ("full", "zigzag", 9, 20),
    ("causal documents key_padding", "zigzag", 33, 33),
]


def check_case(group: dist.ProcessGroup, text: str, order: str, S: int, T: int, dtype: torch.dtype) -> None:
    """Results and gradients of this rank against attention over the whole sequence."""
    rank, degree = group.rank(), group.size()
    torch.manual_seed(1)
    full = [torch.randn(2, n, s, d, dtype=torch.float64).to(dtype) for n, s, d in ((4, S, 6), (2, T, 6), (2, T, 10))]
    documents = [torch.randint(0, 3, (2, n)).sort(-1).values if "documents" in text else None for n in (S, T)]
    valid = torch.rand(2, T) > 0.3 if "key_padding" in text else None
    bias = torch.randn(1, 4, S, T, dtype=torch.float64).to(dtype)
    grad_out = torch.randn(2, 4, S, 10, dtype=torch.float64).to(dtype)

    whole = [x.clone().requires_grad_() for x in (*full, bias)]
    out, lse = attention(*whole[:3], None, None, *documents, valid, whole[3], text, 0.4)
    expected = [out, lse, *torch.autograd.grad(out, whole, grad_out)]

    def take(x: torch.Tensor) -> torch.Tensor:
        return sequence.take(x.detach(), 2, rank, degree, order)

    local = [take(x).requires_grad_() for x in (*full, bias)]
    name = str(group.group_name)
    out, lse = ring_attention(*local[:3], *documents, valid, local[3], text, 0.4, S, T, name, degree, order)
    found = [out, lse, *torch.autograd.grad(out, local, take(grad_out))]
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        length = T if index in (3, 4) else S
        real = sequence.positions(length, rank, degree, order) < length
        tolerance = 1e-12 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(a[:, :, real], take(b)[:, :, real], rtol=tolerance, atol=tolerance)


def check_hops(group: dist.ProcessGroup, order: str) -> None:
    """Documents that end where ranks' parts do: nothing is sent. Else keys, and in the backward two gradients more."""
    rank, degree, name = group.rank(), group.size(), str(group.group_name)
    S = 8 * degree
    own = {"contiguous": (S // degree,) * degree, "zigzag": (S // 4, S // 2, S // 4)}[order]
    for lengths, sent in ((own, (0, 0)), ((S // 4 - 1, S - S // 4 + 1), (1, 3))):
        documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        torch.manual_seed(1)
        full = [torch.randn(1, n, S, 6, dtype=torch.float64) for n in (4, 2, 2)]
        whole = [x.clone().requires_grad_() for x in full]
        out, _ = attention(*whole, None, None, documents, documents, None, None, "causal documents", 0.4)
        expected = [out, *torch.autograd.grad(out.square().sum(), whole)]
        hops = torch.ops.spx.ring_hops(documents, documents, "causal documents", degree, order, 1)
        hops = torch.ops.spx.agree_on_hops(hops, name)
        local = [sequence.take(x, 2, rank, degree, order).requires_grad_() for x in full]
        found: list[torch.Tensor] = []

        def forward(local=local, hops=hops, found=found, documents=documents) -> None:  # type: ignore[no-untyped-def]
            data = (documents, documents, None, None, "causal documents", 0.4, S, S, name, degree, order)
            found[:] = [ring_attention(*local, *data, hops=hops)[0]]

        def backward(local=local, found=found) -> None:  # type: ignore[no-untyped-def]
            found += torch.autograd.grad(found[0].square().sum(), local)

        counts = [sum(row.count for row in count_collectives(run)) for run in (forward, backward)]
        assert counts == list(sent), (order, lengths, counts)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, sequence.take(b, 2, rank, degree, order), rtol=1e-10, atol=1e-10)


def check_disagreement(group: dist.ProcessGroup) -> None:
    """Every rank is told, before any of them waits for a message."""
    mine = torch.arange(group.size()) <= group.rank()
    with pytest.raises(RanksDisagree, match="document ids"):
        torch.ops.spx.agree_on_hops(mine, str(group.group_name))


def check_all() -> None:
    groups = [dist.group.WORLD, dist.new_group(list(range(dist.get_world_size())))]
    for group in groups:
        assert group is not None
        for text, order, S, T in CASES:
            check_case(group, text, order, S, T, torch.float64)
        check_case(group, "causal", "zigzag", 32, 32, torch.bfloat16)
    for order in sequence.ORDERS:
        check_hops(dist.group.WORLD, order)
    check_disagreement(dist.group.WORLD)


@pytest.mark.thinned(10)
def test_two_processes(worker_pool: Callable[[int], WorkerPool]) -> None:
    worker_pool(2).run(check_all)
