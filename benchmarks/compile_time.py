"""How long a compile takes: against plain Inductor, by layers and by ranks, cold, and warm in new processes.

    python benchmarks/compile_time.py [--layers 4,16,80] [--ranks 2,1024] [--axis cp] [--attention auto]
                                      [--warm-layers 8] [--seq 2048] [--no-warm] [--json]
    python benchmarks/compile_time.py --explain 8,16,32,64

Cold: one process compiles models/llama.py, forward and backward, for one rank of a mesh; nothing is run, so that any
number of ranks will do. "own" is all that this project adds: capture, all passes, the verifier; "passes" what stands
in the pipeline; the rest is AOTAutograd and Inductor, with no cache. The same model under plain Inductor stands next to
it, from the same process. Seconds are of this process's CPU, since a busy machine stretches those of the clock; the C++
compiler, which Inductor runs beside, is in the seconds of the clock alone. Aims: own time linear in layers and equal
for any number of ranks, passes at most 10% of the whole.

Warm: the first step of two gloo processes, twice, with one folder for caches: the second time in new processes. Aim: at
most a quarter of the first. Exits with 1 if losses or gradients of the two differ.

--explain: CPU seconds of `spcompile explain models:llama3-8b --mesh cp=8 --seq 128k` for so many layers, and what of
them planning memory took. Aims: linear in layers, planning at most 10%.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

import spcompile
from spcompile import models
from spcompile.backend import plain
from spcompile.command.train import join_processes, on_processes
from spcompile.graph.axes import bind_axes, groups_of
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.program import partition
from spcompile.program.build import build
from spcompile.program.emit import Emission, emit
from spcompile.program.pipeline import History

WARM_RANKS = 2


class Stop(Exception):
    """The compile is over; there is nothing to run it with."""


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Neither graphs nor kernels of an earlier compile; the backward is compiled with the forward."""
    with (
        tempfile.TemporaryDirectory() as folder,
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def compile_once(layers: int, seq: int, backend: Callable[..., Any]) -> None:
    """Trace a Llama of `layers` layers and hand it to `backend`."""
    torch._dynamo.reset()
    model = models.build("llama", layers=layers)
    ids = torch.randint(0, 50, (1, seq))

    def stopping(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        backend(gm, inputs)

        def stop(*_: Any) -> Any:
            raise Stop

        return stop

    with no_cache(), contextlib.suppress(Stop):
        torch.compile(model, backend=stopping)(ids, ids)


def measure_plain(layers: int, seq: int) -> float:
    """CPU seconds of plain Inductor, behind Dynamo."""
    seconds = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> None:
        start = time.process_time()
        plain(gm, inputs, "inductor")
        seconds.append(time.process_time() - start)

    compile_once(layers, seq, backend)
    return seconds[0]


@dataclass
class Timed(Emission):
    """An emission that adds up the CPU seconds of its SCHEDULE stage, verifier included."""

    seconds: float = 0.0

    def schedule(self, gm: fx.GraphModule, phase: str) -> None:
        start = time.process_time()
        super().schedule(gm, phase)
        self.seconds += time.process_time() - start


def measure(layers: int, ranks: int, seq: int, axis: str = "cp", attention: str = "auto") -> dict[str, Any]:
    """Seconds of spcompile for one of `ranks` ranks, behind Dynamo, and what each pass took of it."""
    row: dict[str, Any] = {"layers": layers, "ranks": ranks}

    def bind(graph: fx.Graph) -> None:
        bind_axes(graph, dict.fromkeys(groups_of(graph, {}), dist.group.WORLD.group_name))  # type: ignore[union-attr]

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> None:
        history = History(keep_texts=False)
        clock, start = time.perf_counter(), time.process_time()
        program = build(gm, inputs, MeshShape.of({axis: ranks}), Options(attention=attention), PIPELINE, history)
        built = time.process_time() - start
        emission = Timed(program, bind=bind)
        emit(emission, "inductor")
        total, clock = time.process_time() - start, time.perf_counter() - clock
        own = built + emission.seconds
        nodes = len(program.gm.graph.nodes)
        row.update(nodes=nodes, own=own, schedule=emission.seconds, total=total, clock=clock, share=own / total)
        passes: dict[str, float] = {}
        for snapshot in history.snapshots:
            passes[snapshot.name] = passes.get(snapshot.name, 0.0) + snapshot.report.milliseconds
        row["passes"] = {name: round(milliseconds) for name, milliseconds in passes.items()}
        row["passes_share"] = sum(passes.values()) / 1e3 / total

    compile_once(layers, seq, backend)
    return row


def cold(layers: list[int], ranks: list[int], seq: int, axis: str, attention: str) -> list[dict[str, Any]]:
    """All rows; the first compile of a process pays for imports, so one is made before."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=max(ranks))
    measure(1, ranks[0], seq, axis, attention)
    rows = []
    for count in layers:
        alone = measure_plain(count, seq)
        rows += [{**measure(count, n, seq, axis, attention), "plain": alone} for n in ranks]
    dist.destroy_process_group()
    return rows


def first_step(layers: int, seq: int, folder: str) -> dict[str, Any]:
    """On every rank: seconds of the first step, which compiles; its loss and the sum of all gradients' squares."""
    from torch._dynamo.utils import counters

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    with join_processes():
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = models.build("llama", layers=layers)
        model.compile(backend="spcompile")
        ids = torch.randint(0, 50, (1, seq))
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        loss = model(ids, ids)
        loss.backward()
        dist.barrier()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        hits = counters["inductor"]["fxgraph_cache_hit"]
        squares = sum(float(p.grad.square().sum()) for p in model.parameters())
        again = time.process_time()
        model(ids, ids).backward()
        step = time.process_time() - again
        found = {"seconds": seconds, "cpu": cpu, "step": step, "cache_hits": hits}
        return {**found, "loss": loss.item(), "gradients": squares}


def warm(layers: int, seq: int) -> dict[str, Any]:
    """The first step in new processes without and with what the first ones left in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [on_processes(WARM_RANKS, first_step, layers, seq, folder)[0] for _ in range(2)]
    return {"layers": layers, "cold": runs[0], "warm": runs[1], "ratio": runs[1]["seconds"] / runs[0]["seconds"]}


def explained(layers: int) -> dict[str, Any]:
    """CPU seconds of explaining a Llama 3 8B of so many layers; planning: those of the plan of memory among them."""
    planning = [0.0]
    plan = partition.plan_memory

    def timed(*args: Any) -> Any:
        start = time.process_time()
        try:
            return plan(*args)
        finally:
            planning[0] += time.process_time() - start

    torch._dynamo.reset()
    with torch.device("meta"):
        model = models.build("llama3-8b", layers=layers).to(torch.bfloat16)
        ids = torch.empty(1, 131072, dtype=torch.int64)
    partition.plan_memory = timed
    start = time.process_time()
    try:
        spcompile.explain(model, [ids, ids], {"cp": 8})
    finally:
        partition.plan_memory = plan
    return {"layers": layers, "seconds": time.process_time() - start, "planning": planning[0]}


def show_explained(rows: list[dict[str, Any]]) -> None:
    table = Table("layers", "explain, CPU s", "s a layer", "planning memory, s")
    for row in rows:
        cells = (row["seconds"], row["seconds"] / row["layers"], row["planning"])
        table.add_row(str(row["layers"]), *(f"{cell:.2f}" for cell in cells))
    Console(width=120).print(table)


def show(rows: list[dict[str, Any]], again: dict[str, Any] | None) -> None:
    table = Table(
        "layers",
        "ranks",
        "local nodes",
        "own, s",
        "whole, s",
        "own, share",
        "passes, share",
        "own, ms a layer",
        "plain Inductor, s",
        "clock, s",
        "own of it",
    )
    for column in table.columns:
        column.justify = "right"
    for r in rows:
        per_layer = f"{r['own'] * 1e3 / r['layers']:.0f}"
        cells = [str(r[name]) for name in ("layers", "ranks", "nodes")]
        cells += [f"{r['own']:.2f}", f"{r['total']:.2f}", f"{r['share']:.0%}", f"{r['passes_share']:.0%}", per_layer]
        table.add_row(*cells, f"{r['plain']:.2f}", f"{r['clock']:.1f}", f"{r['own'] / r['clock']:.0%}")
    console = Console(width=120)
    console.print(table)
    for r in rows:
        slowest = sorted(r["passes"].items(), key=lambda item: -item[1])[:6]
        named = ", ".join(f"{name} {ms}" for name, ms in slowest)
        console.print(f"{r['layers']} layers, {r['ranks']} ranks, slowest passes (ms): {named}")
    if again is None:
        return
    first, second = again["cold"], again["warm"]
    console.print(
        f"first step on {WARM_RANKS} processes, {again['layers']} layers: cold {first['seconds']:.1f} s, "
        f"warm {second['seconds']:.1f} s ({again['ratio']:.2f}), {second['cache_hits']} graphs from Inductor's cache, "
        f"CPU of rank 0 {first['cpu']:.1f} s and {second['cpu']:.1f} s, of a later step {second['step']:.1f} s"
    )


def main() -> int:
    """Returns the exit status."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=numbers, default=[4, 16, 80])
    parser.add_argument("--ranks", type=numbers, default=[2, 1024])
    parser.add_argument("--warm-layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--axis", choices=("cp", "tp"), default="cp")
    parser.add_argument("--attention", choices=("auto", "ring", "ulysses"), default="auto")
    parser.add_argument("--no-warm", action="store_true")
    parser.add_argument("--explain", type=numbers)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.explain:
        explained(1)  # pays for imports
        explanations = [explained(count) for count in given.explain]
        if given.json:
            print(json.dumps({"schema": 1, "torch": torch.__version__, "explain": explanations}, indent=1))
        else:
            show_explained(explanations)
        return 0
    again = None if given.no_warm else warm(given.warm_layers, given.seq)
    rows = cold(given.layers, given.ranks, given.seq, given.axis, given.attention)
    if given.json:
        print(json.dumps({"schema": 1, "torch": torch.__version__, "cold": rows, "warm": again}, indent=1))
    else:
        show(rows, again)
    return int(again is not None and any(again["cold"][name] != again["warm"][name] for name in ("loss", "gradients")))


if __name__ == "__main__":
    sys.exit(main())
