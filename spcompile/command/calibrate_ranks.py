"""What each rank does for `spcompile calibrate`: all compute at the same time, as in a step, and the slowest counts."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spcompile.attention.scores.mask import AttentionMask
from spcompile.collectives.point_to_point import Requests, Shift, Wait, drive
from spcompile.command.train import join_processes
from spcompile.machine.curves import TimeCurve
from spcompile.machine.host import cores
from spcompile.machine.measured import Measured
from spcompile.schedule.op_cost import visible

_REPEATS = 5
_HEADS, _HEAD_SIZE = 8, 64


@dataclass(frozen=True)
class Sizes:
    """What is measured. widths: of square products; lengths: of attention; elements: of copies and collectives."""

    widths: Sequence[int]
    lengths: Sequence[int]
    elements: Sequence[int]
    dtypes: Sequence[torch.dtype]


ON_CPU = Sizes(
    (32, 64, 128, 256, 512, 1024), (64, 256, 512, 1024, 2048), (1 << 8, 1 << 14, 1 << 18, 1 << 22), (torch.float32,)
)
ON_GPU = Sizes(
    (128, 512, 1024, 2048, 4096, 8192),
    (512, 2048, 8192, 32768),
    (1 << 8, 1 << 16, 1 << 22, 1 << 27),
    (torch.bfloat16, torch.float32),
)


def calibrate_rank(sizes: Sizes | None = None) -> Measured:
    """In processes of `on_processes`. sizes: by default those of the device."""
    with join_processes() as device:
        if device == "cpu":
            torch.set_num_threads(max(1, cores() // dist.get_world_size()))
        return measured_by_ranks(device, sizes or (ON_CPU if device == "cpu" else ON_GPU))


def measured_by_ranks(device: str, sizes: Sizes) -> Measured:
    """In a process group; equal on all ranks."""
    products = {dtype.itemsize: _products(device, dtype, sizes.widths) for dtype in sizes.dtypes}
    attention = {dtype.itemsize: _attention(device, dtype, sizes.lengths) for dtype in sizes.dtypes}
    tiny = torch.ones(8, device=device)
    is_cpu = device == "cpu"
    name = platform.processor() or platform.machine() if is_cpu else torch.cuda.get_device_name()
    total = None if is_cpu else torch.cuda.get_device_properties(0).total_memory
    return Measured(
        name=f"{name}, {dist.get_world_size()} ranks",
        device=device,
        ranks=dist.get_world_size(),
        torch=torch.__version__,
        memory_bytes=total,
        seconds_per_kernel=_seconds(lambda: tiny + 1, device, rounds=100),
        products=products,
        attention=attention,
        memory=_memory(device, sizes.elements),
        collectives={name: _collective(name, device, sizes.elements) for name in _SENT},
    )


def _products(device: str, dtype: torch.dtype, widths: Sequence[int]) -> TimeCurve:
    points = []
    for n in widths:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        points.append((2.0 * n**3, _seconds(lambda a=a, b=b: a @ b, device)))  # type: ignore[misc]
    return TimeCurve.through(points)


def _attention(device: str, dtype: torch.dtype, lengths: Sequence[int]) -> TimeCurve:
    """Causal, forward and backward together: two products and five, of what the mask leaves."""
    points = []
    for n in lengths:
        q, k, v = (
            torch.randn(1, _HEADS, n, _HEAD_SIZE, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            out, *_ = torch.ops.spx.attention(q, k, v, *[None] * 6, "causal", _HEAD_SIZE**-0.5)
            torch.autograd.grad(out.sum(), (q, k, v))

        flops = 7 * 2.0 * _HEADS * n * n * _HEAD_SIZE * visible(AttentionMask(causal=True), n)
        points.append((flops, _seconds(both, device)))
    return TimeCurve.through(points)


def _memory(device: str, elements: Sequence[int]) -> TimeCurve:
    points = []
    for n in elements:
        x, y = torch.ones(n, device=device), torch.empty(n, device=device)
        points.append((8.0 * n, _seconds(lambda x=x, y=y: y.copy_(x), device)))  # type: ignore[misc]
    return TimeCurve.through(points)


_c10d = torch.ops._c10d_functional


def _all_gather(x: Tensor, ranks: int) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_gather_into_tensor(x, ranks, _group().group_name))


def _reduce_scatter(x: Tensor, ranks: int) -> Tensor:
    return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(x, "sum", ranks, _group().group_name))


def _all_reduce(x: Tensor, ranks: int) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x, "sum", _group().group_name))


def _all_to_all(x: Tensor, ranks: int) -> Tensor:
    parts = [x.numel() // ranks] * ranks
    return _c10d.wait_tensor(_c10d.all_to_all_single(x, parts, parts, _group().group_name))


def _message(x: Tensor, ranks: int) -> Tensor:
    def hop() -> Requests[Tensor]:
        handle = yield Shift(x, 1)
        return (yield Wait(handle))

    return drive(hop(), _group())


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


# name -> (call, bytes that a rank sends of a byte that is handed in, by ranks)
_SENT: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[int], float]]] = {
    "all_gather": (_all_gather, lambda n: n - 1.0),
    "reduce_scatter": (_reduce_scatter, lambda n: (n - 1) / n),
    "all_reduce": (_all_reduce, lambda n: 2 * (n - 1) / n),
    "all_to_all": (_all_to_all, lambda n: (n - 1) / n),
    "message": (_message, lambda n: 1.0),
}


def _collective(name: str, device: str, elements: Sequence[int]) -> TimeCurve:
    call, part = _SENT[name]
    ranks = dist.get_world_size()
    points = []
    for n in elements:
        x = torch.zeros(-(-n // ranks) * ranks, device=device)
        points.append((4 * x.numel() * part(ranks), _seconds(lambda x=x: call(x, ranks), device)))  # type: ignore[misc]
    return TimeCurve.through(points)


def _seconds(call: Callable[[], object], device: str, rounds: int = 1) -> float:
    """Of one call: the median of a few, each of the slowest rank. All ranks start together."""
    call()
    found = []
    for _ in range(_REPEATS):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / rounds)
    slowest = torch.tensor(found, device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())
