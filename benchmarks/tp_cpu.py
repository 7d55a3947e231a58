"""One training step of a Hugging Face Llama on two processes: axis tp against torch's hand-planned parallelize_module.

    python benchmarks/tp_cpu.py [--seq 256] [--dim 256] [--layers 2] [--steps 15]

Theirs: ColwiseParallel, RowwiseParallel and SequenceParallel, planned by hand below, eager and under torch.compile.
They save the activations that they gather.
Ours, without a plan: `parallelize`, where each rank holds the parts of the weights that it uses, as theirs does; and
the plain model, whose weights are whole on every rank, so that their gradients are gathered. regather=False saves
gathered activations as theirs does, and is what their bytes compare with; by default the backward gathers them again.

All in the same processes, on the same weights and batch, step by step in turn: machines are not equally fast for
long. The ratios are medians of the rounds' own ratios. The table goes to stderr, one line of JSON to stdout. Exits with
1 if a loss differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import spcompile
from spcompile.collectives.counting import count_collectives
from spcompile.command.train import join_processes, on_processes
from spcompile.command.train_report import relative
from spcompile.machine.host import cores

RANKS = 2
WARM_UP = 2  # steps
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Measurement:
    """seconds: of every step but the first, which compiles; traffic: calls and bytes handed over, by op.

    cpu_seconds: what this process computed in each, all threads together; it feels other work on the machine less.
    """

    name: str
    loss: float
    seconds: list[float]
    cpu_seconds: list[float]
    first_seconds: float
    traffic: dict[str, tuple[int, int]]


def llama(options: argparse.Namespace) -> nn.Module:
    import transformers as T

    T.logging.set_verbosity_error()
    config = T.LlamaConfig(
        hidden_size=options.dim,
        intermediate_size=3 * options.dim,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model: nn.Module = T.LlamaForCausalLM(config).train()
    return model


def by_hand(model: Any, mesh: DeviceMesh, *, whole_embeddings: bool = False) -> nn.Module:
    """Megatron with sequence parallelism, as torch's tutorial plans it.

    whole_embeddings: Shard the sequence in front of the first layer only. The model makes its mask in the shape of the
    embeddings, and needs it when it is compiled.
    """
    embeddings = Replicate() if whole_embeddings else Shard(1)
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=embeddings),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    if whole_embeddings:
        cut = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True)
        ends["model.layers.0"] = cut
    parallelize_module(model, mesh, ends)
    for layer in model.model.layers:
        plan = {
            "input_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
            "post_attention_layernorm": SequenceParallel(),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(layer, mesh, plan)
    return model


class Contender:
    """One model, and the times of its steps: forward and backward; the optimizer would be the same for all."""

    def __init__(self, name: str, model: nn.Module, batch: dict[str, Any]) -> None:
        self.name, self.model, self.batch = name, model, batch
        self.loss = torch.zeros(())
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def step(self) -> None:
        """One step."""
        self.model.zero_grad()
        self.loss = self.model(**self.batch).loss
        self.loss.backward()

    def timed_step(self) -> None:
        """One step, from when all ranks are ready until the last one is."""
        dist.barrier()
        start, computed = time.perf_counter(), time.process_time()
        self.step()
        dist.barrier()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - computed)

    def result(self) -> Measurement:
        """What was measured; counts the traffic of one more step."""
        traffic = {row.op: (row.count, row.bytes) for row in count_collectives(self.step)}
        seconds, cpu_seconds = self.seconds[WARM_UP:], self.cpu_seconds[WARM_UP:]
        return Measurement(self.name, self.loss.item(), seconds, cpu_seconds, self.seconds[0], traffic)


def run_rank(options: argparse.Namespace) -> list[Measurement]:
    """All contenders in this process."""
    torch.set_num_threads(max(1, cores() // RANKS))
    found: list[Contender] = []
    with join_processes():
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        ids_BS = torch.randint(1024, (1, options.seq), generator=torch.Generator().manual_seed(1))
        positions_BS = torch.arange(options.seq)[None]
        batch = {"input_ids": ids_BS, "labels": ids_BS, "position_ids": positions_BS, "use_cache": False}
        plain = llama(options)
        for name, make in contenders(mesh, batch).items():
            contender = Contender(name, make(copy.deepcopy(plain)), batch)
            try:
                contender.timed_step()
            except Exception as error:  # a contender that cannot run is a result too; all ranks see the same error
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            else:
                found.append(contender)
        for number in range(options.steps + WARM_UP - 1):
            for contender in found[number % len(found) :] + found[: number % len(found)]:
                contender.timed_step()
        return [contender.result() for contender in found]


def contenders(mesh: DeviceMesh, batch: dict[str, Any]) -> dict[str, Callable[[Any], nn.Module]]:
    """How each model is made, the baseline first."""

    def compiled(model: Any, backend: str, **options: Any) -> nn.Module:
        model.compile(backend=backend, dynamic=False, **options)
        return model

    def plain(model: Any, **options: Any) -> nn.Module:
        return compiled(model, "spcompile", options={"mesh": mesh, "outputs": "loss", **options})

    def parallelized(model: Any, **options: Any) -> nn.Module:
        return spcompile.parallelize(model, mesh, batch, outputs="loss", **options)

    return {
        "theirs, eager": lambda model: by_hand(model, mesh),
        "theirs, torch.compile": lambda model: compiled(by_hand(model, mesh, whole_embeddings=True), "inductor"),
        "ours, parallelize": parallelized,
        "ours, parallelize, regather=False": lambda model: parallelized(model, regather=False),
        "ours, plain model": plain,
        "ours, plain model, regather=False": lambda model: plain(model, regather=False),
    }


def planned(options: argparse.Namespace) -> dict[str, int]:
    """Bytes on the wire per rank, by the cost model: activations, and gradients of weights held whole."""
    ids_BS = torch.zeros(1, options.seq, dtype=torch.int64)
    batch = {"input_ids": ids_BS, "labels": ids_BS, "use_cache": False}
    plan = spcompile.explain(llama(options), batch, mesh={"tp": RANKS}, outputs="loss")
    found = {"activation": 0, "parameter gradient": 0}
    for row in plan.collectives:
        found["parameter gradient" if row.origin == "parameter gradient" else "activation"] += int(row.bytes)
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How much more of it a step takes: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"seq": 256, "dim": 256, "layers": 2, "steps": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rows: list[Measurement] = on_processes(RANKS, run_rank, options)[0]
    cost = planned(options)
    against = [row for row in rows if row.name.startswith("theirs")]
    titles = [f"{what} / {row.name}" for what in ("step", "CPU") for row in against]
    table = Table("", "step, s", *titles, "first step, s", "handed over, kB", "calls", "loss")
    for row in rows:
        size, calls = (sum(v[i] for v in row.traffic.values()) for i in (1, 0))
        ratios = [f"{ratio(row.seconds, other.seconds):.2f}" for other in against]
        ratios += [f"{ratio(row.cpu_seconds, other.cpu_seconds):.2f}" for other in against]
        figures = f"{statistics.median(row.seconds):.3f}", *ratios, f"{row.first_seconds:.1f}", f"{size / 1e3:,.0f}"
        table.add_row(row.name, *figures, str(calls), f"{row.loss:.6f}")
    console = Console(stderr=True, width=160)
    console.print(table)
    console.print({row.name: row.traffic for row in rows})
    console.print("cost model, kB on the wire per rank:", {name: round(size / 1e3) for name, size in cost.items()})
    print(json.dumps({"schema": 1, "options": vars(options), "cost": cost, "results": [asdict(row) for row in rows]}))
    return int(any(not relative(row.loss, rows[0].loss) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
