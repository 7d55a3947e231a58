"""What comparing ranks costs a training step of a Llama on two gloo processes, and what it would launch on a GPU.

    python benchmarks/agreement.py [--seq 2048] [--dim 512] [--layers 4] [--steps 10] [--json]

CPU: the wall time that calls and backwards spend in comparisons, which is their own time and the wait for the slower
rank, against the step; then, ranks having met in a barrier, a comparison alone: of what runs, of the inputs' values, of
all parameters (once for each graph, and after a checkpoint is loaded). GPU, counted from the same code on CPU: kernels
and bytes for the checksums of a call, bytes copied to the host, and ops for whose result the step would wait.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from spcompile.command.train import join_processes, on_processes
from spcompile.machine.host import cores
from spcompile.models import build
from spcompile.program.agreement import Agreement
from spcompile.program.checked_calls import CheckedCalls
from spcompile.program.checksum import checksum
from spcompile.program.facts import Record
from spcompile.program.same_weights import record_of_values

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero")
VIEWS = ("view", "reshape", "detach", "slice", "alias", "expand")


class Kernels(TorchDispatchMode):
    """Counts ops that launch something on a GPU, and those of them whose result the host waits for."""

    count = waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.count += not name.startswith(VIEWS)
        self.waits += name.startswith(WAITS)
        return func(*args, **(kwargs or {}))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Steps on this rank, with the other one."""
    with join_processes():
        torch.set_num_threads(max(1, cores() // 2))
        torch.manual_seed(0)
        model: Any = build("llama", layers=options.layers, dim=options.dim, hidden=3 * options.dim)
        model.compile(backend="spcompile", options={"compiler": options.compiler, "outputs": "loss"}, dynamic=False)
        ids_BS = torch.randint(256, (1, options.seq))
        stopwatch = Stopwatch()
        stopwatch.watch(CheckedCalls, "_compare_call")
        stopwatch.watch(Agreement, "require")
        steps, inside = [], []
        for _ in range(options.steps + 1):
            model.zero_grad()
            dist.barrier()
            start, before = time.perf_counter(), stopwatch.seconds
            model(ids_BS, ids_BS).backward()
            steps.append(time.perf_counter() - start)
            inside.append(stopwatch.seconds - before)
        agreement = next(own for own in stopwatch.owners if isinstance(own, Agreement))
        named = list(model.named_parameters())
        names, weights = [name for name, _ in named], [p for _, p in named]
        kernels = Kernels()
        with kernels:
            checksum(ids_BS)
        return {
            "step_s": median(steps[1:]),
            "in_comparisons_s": median(inside[1:]),
            "what_runs_s": alone(lambda: agreement.require(Record("runs nothing"))),
            "checksum_of_inputs_s": alone(lambda: checksum(ids_BS).item()),
            "parameters_s": alone(lambda: agreement.require(record_of_values(names, weights, "nothing")), 5),
            "parameter_bytes": float(sum(p.numel() * p.element_size() for p in weights)),
            "gpu_kernels_per_input": float(kernels.count),
            "gpu_bytes_read_per_call": float(2 * ids_BS.numel() * ids_BS.element_size()),
            "gpu_bytes_to_host_per_call": 8.0,
            "gpu_waits_per_input": float(kernels.waits),
        }


class Stopwatch:
    """Seconds inside methods, and whose they were; one inside the other counts once."""

    def __init__(self) -> None:
        self.seconds, self.owners, self._depth = 0.0, list[Any](), 0

    def watch(self, owner: Any, name: str) -> None:
        """Count calls of this method from now on."""
        method = getattr(owner, name)

        def call(own: Any, *args: Any) -> Any:
            self.owners.append(own)
            self._depth += 1
            start = time.perf_counter()
            try:
                return method(own, *args)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - start

        setattr(owner, name, call)


def alone(work: Callable[[], Any], times: int = 50) -> float:
    """Seconds of one of several in a row."""
    work()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seq", 2048), ("dim", 512), ("layers", 4), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compiler", default="eager")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = on_processes(2, measure, options)[0]
    found["share_of_step"] = found["in_comparisons_s"] / found["step_s"]
    if options.json:
        print(json.dumps(found))
        return
    table = Table(title=f"Llama, {options.layers} layers of {options.dim}, {options.seq} tokens, two processes")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for name, value in found.items():
        times = f"{1e3 * value:.3f} ms" if name.endswith("_s") else f"{value:.0f}"
        table.add_row(name.removesuffix("_s"), f"{100 * value:.2f} %" if name == "share_of_step" else times)
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
