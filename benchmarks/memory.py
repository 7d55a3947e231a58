"""The plan of memory beside what a step really takes, on CPU: bytes saved for the backward, and the peak.

    python benchmarks/memory.py [--models models:llama models:gpt models:bert] [--mesh cp=2 ...] [--seq 1024] [--json]

One rank of each mesh runs for real, on a process group that moves nothing: its numbers mean nothing, its tensors have
their sizes (benchmarks/one_rank.py). Levels of option `memory`: "speed", "min", and a budget halfway between the two.
Measured: what autograd keeps, and the high-water mark of PyTorch's allocator. Bars: saved bytes equal, the peak within
3% at worst. What kernels hold inside for each thread is part of the peak and of no plan, so one thread runs.

With --compiler eager values die with their last reader, and the plan counts every value. With inductor, calls that it
fuses are left out of the plan, and what it writes in place is not known to it: there the peak is an estimate.

Last it measures how long planning takes for a deep model: --layers, by default 80.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from compile_time import explained
from one_rank import OneRank, as_rank, one_rank
from rich.console import Console
from rich.table import Table

from spcompile.command.model_spec import build_model
from spcompile.memory.allocated import peak_on_cpu

MODELS = ("models:llama", "models:gpt", "models:bert")
MESHES = ({"cp": 2}, {"tp": 2}, {"tp": 2, "cp": 2})
LEVELS = ("speed", "half", "min")
WORST = 0.03  # of the peak
MIB = 2**20


def measured(rank: OneRank) -> dict[str, Any]:
    """Of a step behind the first, which makes what later steps keep."""
    rank.step()
    rank.drop_gradients()
    peak = peak_on_cpu(rank.step) + rank.held
    rank.drop_gradients()
    planned = rank.planned
    return {
        "saved_planned": int(planned.saved_activation_bytes),
        "saved": rank.saved(),
        "peak_planned": rank.planned_peak,
        "peak": peak,
        "off": rank.planned_peak / peak - 1,
        "at": planned.peak_at,
    }


def rows_of(spec: str, mesh: Mapping[str, int], seq: int, compiler: str, settings: Mapping[str, Any]) -> list[Any]:
    """One row for each level of `memory`."""
    rows, totals = [], {}
    for level in ("speed", "min", "half"):
        built = build_model(spec, seq=seq, device="meta", settings=settings)
        memory = (totals["speed"] + totals["min"]) // 2 if level == "half" else level
        options = {"outputs": "loss", "memory": memory, "compiler": compiler, "accelerator": "cpu"}
        world = 1
        for size in mesh.values():
            world *= size
        with as_rank(world - 1, mesh, "cpu") as here:
            rank = one_rank(built.model, built.example_inputs(1, seq, "meta"), here, **options)
            totals[level] = int(rank.planned.total_bytes)
            found = {"model": spec, "mesh": dict(mesh), "memory": level, **measured(rank)}
        rows.append(found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--mesh", nargs="+", default=None, help="as cp=2 tp=2,cp=2")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--compiler", choices=("eager", "inductor"), default="eager")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the models, as layers=2")
    parser.add_argument("--layers", type=int, default=80, help="of the deep model; 0: no planning is measured")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    meshes = MESHES if given.mesh is None else [_mesh(text) for text in given.mesh]
    settings = {name: int(value) for name, _, value in (one.partition("=") for one in given.set)}
    rows = [r for spec in given.models for m in meshes for r in rows_of(spec, m, given.seq, given.compiler, settings)]
    deep = explained(given.layers) if given.layers else None
    if given.json:
        print(json.dumps({"rows": rows, "planning": deep}, indent=1))
    else:
        Console(width=140).print(_table(rows, given))
        if deep:
            of_it = f"{deep['planning']:.1f} CPU seconds of {deep['seconds']:.1f} of explain"
            print(f"{deep['layers']} layers of Llama 3 8B at 128k tokens: planning memory takes {of_it}")
    wrong = [r for r in rows if r["saved"] != r["saved_planned"] or abs(r["off"]) > WORST]
    sys.exit(1 if wrong and given.compiler == "eager" else 0)


def _mesh(text: str) -> dict[str, int]:
    return {name: int(size) for name, _, size in (one.partition("=") for one in text.split(","))}


def _table(rows: list[Any], given: argparse.Namespace) -> Table:
    table = Table(
        title=f"{given.seq} tokens, float32, compiler {given.compiler}: MiB of one rank, planned and measured"
    )
    for name in ("model", "mesh", "memory", "saved", "measured", "peak", "measured", "off", "at"):
        table.add_column(name, justify="left" if name in ("model", "mesh", "memory", "at") else "right")
    for r in rows:
        sizes = [f"{r[name] / MIB:.3f}" for name in ("saved_planned", "saved", "peak_planned", "peak")]
        mesh = " ".join(f"{axis}={size}" for axis, size in r["mesh"].items())
        table.add_row(r["model"], mesh, r["memory"], *sizes, f"{r['off']:+.2%}", r["at"])
    return table


if __name__ == "__main__":
    main()
