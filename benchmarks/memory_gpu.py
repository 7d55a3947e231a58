"""One rank's share of a long step on one GPU beside the plan of memory: from 32k tokens to the most that fits.

    python benchmarks/memory_gpu.py [--model models:llama3-8b] [--mesh cp=8] [--tokens 32768] [--json FILE]
    python benchmarks/memory_gpu.py --dry-run           on CPU, tiny: everything but the figures of a device

The rank runs for real, bfloat16, batch 1, parameters sharded over cp (ZeRO-3), on a process group that moves nothing:
its numbers mean nothing, its tensors have their sizes (benchmarks/one_rank.py). The states of AdamW in float32 stand
beside it as one tensor. Tokens double until the plan does not fit into the device, less a tenth, or the device is full.
Planned: the peak of everything, by the account of the final graphs. Measured: what PyTorch's allocator gave out at most
in the second step. The allocator's own gaps are not in it; they are what it holds in reserve.

Runs from the source tree; needs torch and triton. Exit status 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import from_tree  # noqa: F401  (first)
import torch
from one_rank import OneRank, as_rank, one_rank

from spcompile.command.model_spec import build_model
from spcompile.memory.allocated import peak_on_cpu

SHARE = 0.9  # of the device's memory that a plan may use
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """Bytes of one rank at one length. measured: None where the device was full. reserved: by the allocator."""

    tokens: int
    fits: bool
    planned: int
    saved: int
    transient: int
    at: str
    measured: int | None = None
    reserved: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        text = f"{self.tokens:>10,} tokens: planned {self.planned / GIB:8.3f} GiB"
        if self.measured is None:
            return f"{text}, {'the device was full' if self.fits else 'does not fit'} ({self.at})"
        off = self.planned / self.measured - 1
        return f"{text}, measured {self.measured / GIB:8.3f} GiB ({off:+.1%}), {self.seconds:.2f} s a step; {self.at}"


def row_of(given: argparse.Namespace, mesh: Mapping[str, int], tokens: int, device: str, budget: int) -> Row:
    """Plan a length and, where that fits, run it."""
    world = 1
    for size in mesh.values():
        world *= size
    dtype = "float32" if device == "cpu" else "bfloat16"
    built = build_model(given.model, seq=tokens, device="meta", dtype=dtype, settings={})
    inputs = built.example_inputs(1, tokens, "meta")
    options = {
        "outputs": "loss",
        "optimizer": "adamw-float32",
        "compiler": given.compiler,
        "memory": budget,
        "accelerator": "cpu" if device == "cpu" else "h100",
    }
    axes = [axis for axis in ("cp",) if axis in mesh]
    with as_rank(world - 1, mesh, device) as here:
        rank = one_rank(built.model, inputs, here, shard_parameters=axes, device=device, **options)
        planned = rank.planned
        row = {
            "tokens": tokens,
            "fits": planned.fits,
            "planned": int(planned.total_bytes),
            "saved": int(planned.saved_activation_bytes),
            "transient": int(planned.transient_bytes),
            "at": planned.peak_at,
        }
        if not planned.fits:
            return Row(**row)
        try:
            return Row(**row, **_measured(rank, device))
        except torch.OutOfMemoryError:
            return Row(**row)


def _measured(rank: OneRank, device: str) -> dict[str, Any]:
    """Of the second step: the first compiles kernels."""
    states = torch.empty(int(rank.planned.optimizer_bytes), dtype=torch.uint8, device=device)
    rank.step()
    rank.drop_gradients()
    if device == "cpu":
        began = time.perf_counter()
        peak = peak_on_cpu(rank.step) + rank.held + states.nbytes
        return {"measured": peak, "seconds": time.perf_counter() - began}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    rank.step()
    torch.cuda.synchronize()
    return {
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "seconds": time.perf_counter() - began,
    }


def rows_of(given: argparse.Namespace, device: str) -> list[Row]:
    """One for each length, up to the first that does not fit."""
    mesh = {name: int(size) for name, _, size in (one.partition("=") for one in given.mesh.split(","))}
    total = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 2**40
    rows: list[Row] = []
    tokens = given.tokens
    while tokens <= given.most:
        rows.append(row_of(given, mesh, tokens, device, int(SHARE * total)))
        print(rows[-1], flush=True)
        if rows[-1].measured is None:
            break
        tokens *= 2
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models:llama3-8b")
    parser.add_argument("--mesh", default="cp=8", help="as cp=8 or tp=2,cp=4")
    parser.add_argument("--tokens", type=int, default=32_768, help="the first length")
    parser.add_argument("--most", type=int, default=2**24, help="no length beyond it")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    device = "cpu" if given.dry_run else "cuda"
    if given.dry_run:
        torch.set_num_threads(1)  # what kernels hold for each thread is in no plan
        given.model, given.mesh, given.compiler = "models:llama-tiny", "cp=2", "eager"
        given.tokens, given.most = 256, 512
    elif not torch.cuda.is_available():
        print("no GPU; --dry-run checks the rest", file=sys.stderr)
        return 2
    rows = rows_of(given, device)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
