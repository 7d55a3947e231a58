"""One training step of models/llama.py: one process with all threads against two processes with half of them each.

    python benchmarks/scaling_cpu.py [--seq 2048,4096,8192] [--steps 3] [--dim 256] [--layers 2]

All are compiled by Inductor, in the same run, on the same weights and batches, one after the other. The table goes to
stderr, one line of JSON to stdout. Exits with 1 if the losses of the configurations differ by more than 1e-5.
B batch, S sequence.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from spcompile.command.train import join_processes, on_processes
from spcompile.command.train_report import relative
from spcompile.machine.host import cores
from spcompile.models import build
from spcompile.schedule.saved_bytes import saved_activation_bytes

RANKS = 2
STRATEGIES = ("ring", "ulysses")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Measurement:
    """Seconds of every timed step (the slowest rank's), seconds of the first step, which compiles, bytes per rank."""

    strategy: str
    seq: int
    seconds: list[float]
    first_seconds: float
    saved_bytes: int
    loss: float

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)


def measure(strategy: str, seq: int, options: argparse.Namespace, together: bool) -> Measurement:
    """Time steps in this process; `together`: in step with the other ranks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build("llama", layers=options.layers, dim=options.dim, hidden=3 * options.dim)
    if together:
        model.compile(backend="spcompile", options={"attention": strategy}, dynamic=False)
    else:
        model.compile(backend="inductor", dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids_BS = torch.randint(256, (1, seq), generator=torch.Generator().manual_seed(1))
    seconds, losses = [], []
    for _ in range(options.steps + 1):
        if together:
            dist.barrier()
        start = time.perf_counter()
        loss = model(ids_BS, labels_BS=ids_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if together:
            dist.barrier()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    saved = saved_activation_bytes(model, lambda: model(ids_BS, labels_BS=ids_BS))
    return Measurement(strategy, seq, seconds[1:], seconds[0], saved, losses[-1])


def run_rank(options: argparse.Namespace) -> list[Measurement]:
    """All configurations; ranks other than 0 wait, without work, while rank 0 runs the single process."""
    found = []
    with join_processes():
        for seq in options.seq:
            if dist.get_rank() == 0:
                torch.set_num_threads(cores())
                found.append(measure("one process", seq, options, together=False))
                show(found[-1])
            dist.barrier()
            torch.set_num_threads(max(1, cores() // RANKS))
            for strategy in STRATEGIES:
                found.append(measure(strategy, seq, options, together=True))
                if dist.get_rank() == 0:
                    show(found[-1])
    return found


def show(row: Measurement) -> None:
    print(f"{row.seq:>6} tokens  {row.strategy:<12} {row.step_seconds:8.3f} s a step", file=sys.stderr, flush=True)


def table(rows: list[Measurement]) -> Table:
    """Every configuration; `ratio` is of throughputs, against the single process of the same length."""
    single = {row.seq: row for row in rows if row.strategy == "one process"}
    result = Table("tokens", "", "step, s", "tokens/s", "ratio", "saved, MB", "loss differs")
    for column in (result.columns[0], *result.columns[2:]):
        column.justify = "right"
    for row in rows:
        ratio = single[row.seq].step_seconds / row.step_seconds
        difference = relative(row.loss, single[row.seq].loss)
        speed, saved = f"{row.seq / row.step_seconds:,.0f}", f"{row.saved_bytes / 1e6:,.1f}"
        cells = [f"{row.step_seconds:.3f}", speed, f"{ratio:.2f}", saved, f"{difference:.1e}"]
        result.add_row(str(row.seq), row.strategy, *cells, end_section=row.strategy == STRATEGIES[-1])
    return result


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seq", type=lambda text: [int(part) for part in text.split(",")], default=[2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    rows: list[Measurement] = on_processes(RANKS, run_rank, options)[0]
    Console(stderr=True).print(table(rows))
    machine = {"cores": cores(), "processor": platform.machine(), "torch": torch.__version__}
    results = [{**asdict(row), "step_seconds": row.step_seconds} for row in rows]
    print(json.dumps({"schema": 1, "machine": machine, "options": vars(options), "results": results}))
    reference = {row.seq: row.loss for row in rows if row.strategy == "one process"}
    return int(any(not relative(row.loss, reference[row.seq]) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
