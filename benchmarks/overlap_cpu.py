"""How much of the communication of a Llama's training step hides behind compute, on gloo processes: pass on and off.

    python benchmarks/overlap_cpu.py [--ranks 2,4] [--seq 1024] [--dim 512] [--layers 4] [--compilers eager]

Cases: `tp`, tensor parallel with whole products; `tp-chunks`, with products in chunks where that pays; `zero-3`,
parameters sharded over cp; `sums`, whole parameters on cp; `ulysses`, the same by heads, whose all-to-alls
split-all-to-alls may split. Measured with torch.profiler on all ranks: seconds in which compute waits, in `wait_tensor`
or inside an op. Each wait counts as the rank has it that waits least, which is the last to come: the others wait for
its compute besides. Without overlap-collectives and with whole products every wait follows its start, so that this is
the whole communication; what remains of it with the passes is exposed. Beside it what the tables predict (accelerator
"cpu", link "loopback"). Then, from tables alone, a layer of Llama 3 8B in bf16 on H100s over NVLink, 8192 tokens a
rank: tp = 8 with products whole and in chunks, cp = 8 by Ulysses with one message each way and split. The tables go to
stderr, one line of JSON to stdout. Exits with 1 if a loss differs between pass on and off by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

import spcompile
from spcompile.collectives.point_to_point import WAIT
from spcompile.command.train import join_processes, on_processes
from spcompile.command.train_report import relative
from spcompile.machine.host import cores
from spcompile.models import build
from spcompile.program.observed import observed
from spcompile.schedule.op_cost import cost_model
from spcompile.schedule.timeline import Prediction, predict

TOLERANCE = 1e-5
WAITS = {"_c10d_functional::wait_tensor", WAIT}
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "tp": ("tp", None, {"passes": {"pipeline-matmuls": False}}),
    "tp-chunks": ("tp", None, {}),
    "zero-3": ("cp", "cp", {}),
    "sums": ("cp", None, {}),
    "ulysses": ("cp", None, {"attention": "ulysses"}),
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp = 8, whole products": ("tp", {"passes": {"pipeline-matmuls": False}}),
    "tp = 8, products in chunks": ("tp", {}),
    "cp = 8 by Ulysses, one message each way": ("cp", {"attention": "ulysses", "passes": {"split-all-to-alls": False}}),
    "cp = 8 by Ulysses": ("cp", {"attention": "ulysses"}),
}


@dataclass(frozen=True)
class Measurement:
    """The least over steps, since other programs only add.

    waited: seconds in which all ranks wait; rank_waited: in which rank 0 does, also for the compute of others;
    step: seconds of a step; first: of the one that compiles.
    """

    case: str
    compiler: str
    ranks: int
    overlaps: bool
    waited: float
    rank_waited: float
    step: float
    first: float
    predicted_exposed: float
    predicted_communication: float
    loss: float


def measure(case: str, compiler: str, overlaps: bool, options: argparse.Namespace) -> Measurement:
    """Steps of one configuration in this process, with the other ranks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    axis, shard, options_of_case = CASES[case]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    model: Any = build("llama", layers=options.layers, dim=options.dim, hidden=3 * options.dim)
    ids_BS = torch.randint(256, (1, options.seq), generator=torch.Generator().manual_seed(1))
    batch = {"ids_BS": ids_BS, "labels_BS": ids_BS}
    chosen: dict[str, Any] = {
        "compiler": compiler,
        "outputs": "loss",
        "accelerator": "cpu",
        "links": {axis: "loopback"},
        **options_of_case,
    }
    if not overlaps:
        chosen["passes"] = {"pipeline-matmuls": False, "overlap-collectives": False}
    if shard is None:
        model.compile(backend="spcompile", options={**chosen, "mesh": mesh}, dynamic=False)
    else:
        model = spcompile.parallelize(model, mesh, batch, shard_parameters=shard, **chosen)
    seconds, waited, rank_waited = [], [], []
    with observed() as programs:
        for _ in range(options.steps + 1):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            with profile(activities=[ProfilerActivity.CPU]) as prof:
                loss = model(**batch)
                loss.backward()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
            waits = waits_of(prof)
            waited.append(sum(least_of_ranks(waits)))
            rank_waited.append(sum(waits))
    program, emission = programs[-1]
    found = predict(emission.graphs, cost_model(program.ctx.mesh, program.ctx.options))
    rest = min(waited[1:]), min(rank_waited[1:]), min(seconds[1:]), seconds[0]
    predicted = found.total("exposed"), found.total("communication")
    return Measurement(case, compiler, dist.get_world_size(), overlaps, *rest, *predicted, loss.item())


def waits_of(prof: profile) -> list[float]:
    """Seconds of each wait of a step, in order."""
    events = sorted((e for e in prof.events() if e.name in WAITS), key=lambda e: e.time_range.start)
    return [e.cpu_time_total / 1e6 for e in events]


def least_of_ranks(waits: list[float]) -> list[float]:
    """Each wait as the rank has it that waits least. All ranks run one program: their waits are the same ones."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, waits)
    return [min(one) for one in zip(*of_ranks, strict=True)]


def run_rank(options: argparse.Namespace) -> list[Measurement]:
    """All configurations in this process."""
    torch._functorch.config.enable_autograd_cache = False  # predictions read the graphs of compiles made here
    found = []
    with join_processes():
        torch.set_num_threads(max(1, cores() // dist.get_world_size()))
        for case in options.cases:
            for compiler in options.compilers:
                for overlaps in (False, True):
                    found.append(measure(case, compiler, overlaps, options))
                    if dist.get_rank() == 0:
                        row = found[-1]
                        print(f"{case} {compiler} {overlaps}: {row.waited:.3f} s waited", file=sys.stderr, flush=True)
    return found


def llama_8b_layer(axis: str, chosen: dict[str, Any]) -> Prediction:
    """By the tables: half the difference between three layers and one."""

    def plan(layers: int) -> Prediction:
        with torch.device("meta"):
            sizes = {"heads": 32, "kv_heads": 8, "dim": 4096, "hidden": 14336, "vocab": 128256}
            model = build("llama", layers=layers, **sizes).to(torch.bfloat16)
            ids_BS = torch.zeros(1, 8 * 8192, dtype=torch.int64)
        batch = {"ids_BS": ids_BS, "labels_BS": ids_BS}
        links = {axis: "nvlink"}
        return spcompile.explain(model, batch, mesh={axis: 8}, outputs="loss", links=links, **chosen).predicted

    one, three = plan(1), plan(3)
    phases = [
        type(a)(a.phase, *((y - x) / 2 for x, y in list(zip(vars(a).values(), vars(b).values(), strict=True))[1:]))
        for a, b in zip(one.phases, three.phases, strict=True)
    ]
    return Prediction(tuple(phases), three.assumptions)


def table(rows: list[Measurement]) -> Table:
    """Two rows a configuration; `hidden`: of what compute waits for with the pass off."""
    result = Table(
        "case", "compiler", "ranks", "pass", "step, s", "waited, s", "rank 0, s", "hidden", "predicted hidden", "loss"
    )
    for off, on in zip(rows[::2], rows[1::2], strict=True):
        for row in (off, on):
            hidden = 1 - row.waited / off.waited
            predicted = 1 - row.predicted_exposed / max(row.predicted_communication, 1e-12)
            times = [f"{x:.3f}" for x in (row.step, row.waited, row.rank_waited)]
            cells = [*times, f"{hidden:.0%}", f"{predicted:.0%}", f"{row.loss:.6f}"]
            result.add_row(row.case, row.compiler, str(row.ranks), "on" if row.overlaps else "off", *cells)
    return result


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"seq": 1024, "dim": 512, "layers": 4, "steps": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4])
    parser.add_argument("--compilers", type=lambda text: text.split(","), default=["eager"])
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES))
    options = parser.parse_args()
    rows: list[Measurement] = []
    for ranks in options.ranks:
        rows += on_processes(ranks, run_rank, options)[0]
    console = Console(stderr=True, width=120)
    console.print(table(rows))
    shares: dict[str, float] = {}
    for name, (axis, chosen) in LAYERS.items():
        layer = llama_8b_layer(axis, chosen)
        console.print(f"A layer of Llama 3 8B, {name}, 8192 tokens a rank:", "; ".join(layer.assumptions))
        for phase in layer.phases:
            step, exposed, sent = (1e3 * seconds for seconds in (phase.seconds, phase.exposed, phase.communication))
            console.print(f"  {phase.phase}: {step:.2f} ms, {exposed:.2f} of {sent:.2f} exposed")
        shares[name] = layer.total("exposed") / layer.total("seconds")
        console.print(f"  exposed: {shares[name]:.1%} of the step")
    record = {"schema": 3, "options": vars(options), "results": [asdict(r) for r in rows], "llama_8b_exposed": shares}
    print(json.dumps(record))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return int(any(not relative(on.loss, off.loss) <= TOLERANCE for off, on in pairs))


if __name__ == "__main__":
    sys.exit(main())
