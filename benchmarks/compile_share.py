"""How much of a compile with Inductor is spent in spcompile itself: 2 to 32 layers, forward and backward.

    python benchmarks/compile_share.py [--layers 2,8,32] [--degree 2] [--json]

One process compiles for one rank of the mesh; nothing is run, so no second process is needed. "own" is capture, all
passes and the verifier; the rest is AOTAutograd and Inductor with a cold cache. The aim is at most 20% and a time that
is linear in layers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.testing._internal.distributed.fake_pg import FakeStore

from spcompile import models
from spcompile.emit import Emission, emit
from spcompile.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes.lower_collectives import bind_axes
from spcompile.pipeline import History
from spcompile.program import build


class Stop(Exception):
    """The compile is over; there is nothing to run it with."""


def measure(layers: int, degree: int, seq: int) -> dict[str, Any]:
    """Seconds of one cold compile of models/llama.py with `layers` layers."""
    torch._dynamo.reset()
    row: dict[str, Any] = {"layers": layers}

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        history = History()
        start = time.perf_counter()
        program = build(gm, inputs, MeshShape.of({"cp": degree}), Options(), PIPELINE, history)
        built = time.perf_counter()
        groups = {"cp": dist.group.WORLD.group_name}
        emit(Emission(program, bind=functools.partial(bind_axes, groups=groups)), "inductor")
        total = time.perf_counter() - start
        scheduled = sum(s.report.milliseconds for s in history.snapshots if s.stage.value == "schedule") / 1e3
        own = built - start + scheduled
        row.update(nodes=len(program.gm.graph.nodes), own=own, total=total, share=own / total)
        row["passes"] = {s.name: round(s.report.milliseconds) for s in history.snapshots}

        def stop(*_: Any) -> Any:
            raise Stop

        return stop

    model = models.build("llama", layers=layers)
    ids = torch.randint(0, 50, (1, seq))
    with tempfile.TemporaryDirectory() as cache, torch._inductor.config.patch(fx_graph_cache=False):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        with contextlib.suppress(Stop):
            torch.compile(model, backend=backend)(ids, ids)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,8,32")
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=given.degree)
    rows = [measure(int(n), given.degree, given.seq) for n in given.layers.split(",")]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"compile with Inductor, cp={given.degree}, torch {torch.__version__}")
    for name in ("layers", "local nodes", "own s", "whole s", "share", "own ms / layer"):
        table.add_column(name, justify="right")
    for r in rows:
        per_layer = f"{r['own'] * 1e3 / r['layers']:.0f}"
        cells = (r["layers"], r["nodes"], f"{r['own']:.2f}", f"{r['total']:.2f}", f"{r['share']:.0%}", per_layer)
        table.add_row(*map(str, cells))
    Console().print(table)
    for r in rows:
        slowest = sorted(r["passes"].items(), key=lambda item: -item[1])[:6]
        print(f"{r['layers']} layers, slowest passes (ms):", ", ".join(f"{name} {ms}" for name, ms in slowest))


if __name__ == "__main__":
    main()
