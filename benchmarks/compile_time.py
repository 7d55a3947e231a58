"""How long a compile takes: against plain Inductor, by layers and by ranks, cold, and warm in new processes.

    python benchmarks/compile_time.py [--layers 4,16,80] [--ranks 2,1024] [--warm-layers 8] [--seq 2048] [--json]

Cold: one process compiles models/llama.py, forward and backward, for one rank of a mesh; nothing is run, so that any
number of ranks will do. "own" is capture, all passes and the verifier; the rest is AOTAutograd and Inductor, with no
cache. The same model under plain Inductor stands next to it, from the same process. Aims: own time linear in layers and
equal for any number of ranks, at most 10% of the whole.

Warm: the first step of two gloo processes, twice, with one cache of Inductor: the second time in new processes. Aim: at
most a quarter of the first. Exits with 1 if losses or gradients of the two differ.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from spcompile import models
from spcompile.backend import plain
from spcompile.emit import Emission, emit
from spcompile.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes.lower_collectives import bind_axes
from spcompile.pipeline import History
from spcompile.program import build
from spcompile.train import join_processes, on_processes

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
    """Seconds of plain Inductor, behind Dynamo."""
    seconds = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> None:
        start = time.perf_counter()
        plain(gm, inputs, "inductor")
        seconds.append(time.perf_counter() - start)

    compile_once(layers, seq, backend)
    return seconds[0]


def measure(layers: int, ranks: int, seq: int) -> dict[str, Any]:
    """Seconds of spcompile for one of `ranks` ranks, behind Dynamo, and what each pass took of it."""
    row: dict[str, Any] = {"layers": layers, "ranks": ranks}

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> None:
        history = History()
        start = time.perf_counter()
        program = build(gm, inputs, MeshShape.of({"cp": ranks}), Options(), PIPELINE, history)
        built = time.perf_counter()
        groups = {"cp": dist.group.WORLD.group_name}  # type: ignore[union-attr]
        emit(Emission(program, bind=functools.partial(bind_axes, groups=groups)), "inductor")
        total = time.perf_counter() - start
        scheduled = sum(s.report.milliseconds for s in history.snapshots if s.stage.value == "schedule") / 1e3
        own = built - start + scheduled
        row.update(nodes=len(program.gm.graph.nodes), own=own, total=total, share=own / total)
        passes: dict[str, float] = {}
        for snapshot in history.snapshots:
            passes[snapshot.name] = passes.get(snapshot.name, 0.0) + snapshot.report.milliseconds
        row["passes"] = {name: round(milliseconds) for name, milliseconds in passes.items()}

    compile_once(layers, seq, backend)
    return row


def cold(layers: list[int], ranks: list[int], seq: int) -> list[dict[str, Any]]:
    """All rows; the first compile of a process pays for imports, so one is made before."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=max(ranks))
    measure(1, ranks[0], seq)
    rows = []
    for count in layers:
        alone = measure_plain(count, seq)
        rows += [{**measure(count, n, seq), "plain": alone} for n in ranks]
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
        start = time.perf_counter()
        loss = model(ids, ids)
        loss.backward()
        dist.barrier()
        seconds = time.perf_counter() - start
        hits = counters["inductor"]["fxgraph_cache_hit"]
        squares = sum(float(p.grad.square().sum()) for p in model.parameters())
        return {"seconds": seconds, "cache_hits": hits, "loss": loss.item(), "gradients": squares}


def warm(layers: int, seq: int) -> dict[str, Any]:
    """The first step in new processes without and with what the first ones left in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [on_processes(WARM_RANKS, first_step, layers, seq, folder)[0] for _ in range(2)]
    return {"layers": layers, "cold": runs[0], "warm": runs[1], "ratio": runs[1]["seconds"] / runs[0]["seconds"]}


def show(rows: list[dict[str, Any]], again: dict[str, Any]) -> None:
    table = Table(
        "layers", "ranks", "local nodes", "own, s", "whole, s", "share", "own, ms a layer", "plain Inductor, s"
    )
    for column in table.columns:
        column.justify = "right"
    for r in rows:
        per_layer = f"{r['own'] * 1e3 / r['layers']:.0f}"
        cells = (r["layers"], r["ranks"], r["nodes"], f"{r['own']:.2f}", f"{r['total']:.2f}", f"{r['share']:.0%}")
        table.add_row(*map(str, cells), per_layer, f"{r['plain']:.2f}")
    console = Console(width=120)
    console.print(table)
    for r in rows:
        slowest = sorted(r["passes"].items(), key=lambda item: -item[1])[:6]
        named = ", ".join(f"{name} {ms}" for name, ms in slowest)
        console.print(f"{r['layers']} layers, {r['ranks']} ranks, slowest passes (ms): {named}")
    first, second = again["cold"], again["warm"]
    console.print(
        f"first step on {WARM_RANKS} processes, {again['layers']} layers: cold {first['seconds']:.1f} s, "
        f"warm {second['seconds']:.1f} s ({again['ratio']:.2f}), {second['cache_hits']} graphs from the cache"
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
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    again = warm(given.warm_layers, given.seq)
    rows = cold(given.layers, given.ranks, given.seq)
    if given.json:
        print(json.dumps({"schema": 1, "torch": torch.__version__, "cold": rows, "warm": again}, indent=1))
    else:
        show(rows, again)
    return int(any(again["cold"][name] != again["warm"][name] for name in ("loss", "gradients")))


if __name__ == "__main__":
    sys.exit(main())
