"""Every collective on two real processes (gloo) against its spec: results, gradients, strides, opcheck.

This file is also the program that the processes run: `python test_collective_gloo.py RANK FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from spcompile.collectives import COLLECTIVES, GRADIENT, Call, Collective

DEGREE = 2
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
INT_DTYPES = (torch.int64, torch.bool)


def cases() -> dict[str, tuple[Collective, Call]]:
    return {
        f"{collective.name}-{length}-{i}": (collective, call)
        for collective in COLLECTIVES.values()
        for length in (5, 8, 1)
        for i, call in enumerate(collective.examples(length, DEGREE))
    }


def denoting(state: str, shape: Any, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Small whole numbers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(-9, 9, tuple(shape), generator=generator).to(dtype) for _ in range(DEGREE)]
    return [parts[0].clone() for _ in parts] if state in "IR" else parts


def transposed(state: str, call: Call) -> list[torch.Tensor]:
    """Operands whose memory is not row-major."""
    dims = tuple(range(len(call.shape)))[::-1]
    return [x.permute(dims) for x in denoting(state, call.shape[::-1], torch.float64, seed=1)]


def run_rank(rank: int, folder: str) -> None:
    """Write this rank's result and gradient of every case."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=DEGREE)
    group = dist.group.WORLD.group_name
    found: dict[str, Any] = {}
    for name, (collective, call) in cases().items():
        arguments = {**call.arguments, "axis": group}
        src, dst = collective.signature(arguments)
        for dtype in DTYPES:
            x = denoting(src, call.shape, dtype, seed=1)[rank].requires_grad_()
            y = collective.op(x, **arguments)
            (grad,) = torch.autograd.grad(y, x, denoting(GRADIENT[dst], y.shape, dtype, seed=2)[rank])
            found[f"{name}-{dtype}"] = (y.detach(), y.stride(), grad, grad.stride())
        if src != "P":
            for dtype in INT_DTYPES:
                y = collective.op(denoting(src, call.shape, dtype, seed=1)[rank], **arguments)
                found[f"{name}-{dtype}"] = (y, y.stride())
        strided = transposed(src, call)[rank]
        y = collective.op(strided, **arguments)
        found[f"{name}-strided"] = (y, y.stride())
        if "-5-" in name:
            x = denoting(src, call.shape, torch.float64, seed=1)[rank].requires_grad_()
            found[f"{name}-opcheck"] = torch.library.opcheck(collective.op, (x,), arguments, raise_exception=False)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(DEGREE)
    ]
    logs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * DEGREE, "\n".join(logs)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(DEGREE)]


def contiguous_strides(x: torch.Tensor) -> tuple[int, ...]:
    return torch.empty(x.shape).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases())
def test_result_and_gradient(ranks: list[dict[str, Any]], name: str, dtype: torch.dtype) -> None:
    collective, call = cases()[name]
    src, dst = collective.signature(call.arguments)
    xs = denoting(src, call.shape, dtype, seed=1)
    expected = collective.spec(xs, **call.arguments)
    dual = collective.dual(xs[0], **call.arguments)
    gs = denoting(GRADIENT[dst], expected[0].shape, dtype, seed=2)
    expected_grad = COLLECTIVES[dual.op].spec(gs, **dual.arguments)
    for rank in range(DEGREE):
        y, y_stride, grad, grad_stride = ranks[rank][f"{name}-{dtype}"]
        assert torch.equal(y, expected[rank])
        assert torch.equal(grad, expected_grad[rank])
        assert (y_stride, grad_stride) == (contiguous_strides(y), contiguous_strides(grad))


@pytest.mark.parametrize("dtype", INT_DTYPES)
@pytest.mark.parametrize("name", [name for name, (c, call) in cases().items() if c.signature(call.arguments)[0] != "P"])
def test_numbers_without_gradient(ranks: list[dict[str, Any]], name: str, dtype: torch.dtype) -> None:
    collective, call = cases()[name]
    xs = denoting(collective.signature(call.arguments)[0], call.shape, dtype, seed=1)
    for rank, expected in enumerate(collective.spec(xs, **call.arguments)):
        y, stride = ranks[rank][f"{name}-{dtype}"]
        assert torch.equal(y, expected)
        assert stride == contiguous_strides(y)


@pytest.mark.parametrize("name", cases())
def test_operand_in_other_memory_order(ranks: list[dict[str, Any]], name: str) -> None:
    collective, call = cases()[name]
    parts = transposed(collective.signature(call.arguments)[0], call)
    for rank, expected in enumerate(collective.spec(parts, **call.arguments)):
        y, stride = ranks[rank][f"{name}-strided"]
        assert torch.equal(y, expected)
        assert stride == contiguous_strides(y)


@pytest.mark.parametrize("name", [name for name in cases() if "-5-" in name])
def test_opcheck(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in range(DEGREE):
        assert set(ranks[rank][f"{name}-opcheck"].values()) == {"SUCCESS"}, ranks[rank][f"{name}-opcheck"]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
