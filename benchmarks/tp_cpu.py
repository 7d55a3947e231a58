"""One training step of a Hugging Face Llama on two processes: axis tp against torch's hand-planned parallelize_module.

    python benchmarks/tp_cpu.py [--seq 256] [--dim 256] [--layers 2] [--steps 5]

Theirs: ColwiseParallel, RowwiseParallel and SequenceParallel, planned by hand below, eager and under torch.compile.
Ours: the plain model, without a plan, its parameters whole on every rank, so that gradients of weights are gathered;
they are counted on their own. All in the same processes, on the same weights and batch, one after the other. The table
goes to stderr, one line of JSON to stdout. Exits with 1 if a loss differs by more than 1e-5.
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
from torch import Tensor, nn
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
from spcompile.traffic import traffic_of
from spcompile.train import cores, join_processes, on_processes
from spcompile.train_report import relative

RANKS = 2
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Measurement:
    """step_seconds: the median; first_seconds: the first step, which compiles; traffic: bytes handed over, by op."""

    name: str
    loss: float
    step_seconds: float
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


def measure(name: str, model: nn.Module, batch: dict[str, Tensor], steps: int) -> Measurement:
    """Forward and backward; the optimizer would be the same for all."""
    seconds: list[float] = []
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()

    for _ in range(steps + 1):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    traffic = {row.op: (row.count, row.bytes) for row in traffic_of(step)}
    torch._dynamo.reset()
    return Measurement(name, loss.item(), statistics.median(seconds[1:]), seconds[0], traffic)


def run_rank(options: argparse.Namespace) -> list[Measurement]:
    """All contenders in this process."""
    torch.set_num_threads(max(1, cores() // RANKS))
    found: list[Measurement] = []
    with join_processes():
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
        ids_BS = torch.randint(1024, (1, options.seq), generator=torch.Generator().manual_seed(1))
        positions_BS = torch.arange(options.seq)[None]
        batch = {"input_ids": ids_BS, "labels": ids_BS, "position_ids": positions_BS, "use_cache": False}
        plain = llama(options)
        for name, make in contenders(mesh).items():
            try:
                found.append(measure(name, make(copy.deepcopy(plain)), batch, options.steps))
            except Exception as error:  # a contender that cannot run is a result too; all ranks see the same error
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
            else:
                if dist.get_rank() == 0:
                    print(f"{name}: {found[-1].step_seconds:.3f} s a step", file=sys.stderr, flush=True)
    return found


def contenders(mesh: DeviceMesh) -> dict[str, Callable[[Any], nn.Module]]:
    """Theirs save gathered activations, as ours do with regather=False."""

    def compiled(model: Any, backend: str, **options: Any) -> nn.Module:
        model.compile(backend=backend, dynamic=False, **options)
        return model

    ours = {"mesh": mesh, "outputs": "loss"}
    return {
        "theirs, eager": lambda model: by_hand(model, mesh),
        "theirs, torch.compile": lambda model: compiled(by_hand(model, mesh, whole_embeddings=True), "inductor"),
        "ours": lambda model: compiled(model, "spcompile", options=ours),
        "ours, regather=False": lambda model: compiled(model, "spcompile", options={**ours, "regather": False}),
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


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"seq": 256, "dim": 256, "layers": 2, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rows: list[Measurement] = on_processes(RANKS, run_rank, options)[0]
    cost = planned(options)
    table = Table("", "step, s", "first step, s", "handed over, kB", "calls", "loss")
    for row in rows:
        size, calls = (sum(v[i] for v in row.traffic.values()) for i in (1, 0))
        figures = f"{row.step_seconds:.3f}", f"{row.first_seconds:.1f}", f"{size / 1e3:,.0f}", str(calls)
        table.add_row(row.name, *figures, f"{row.loss:.6f}")
    console = Console(stderr=True)
    console.print(table)
    console.print({row.name: row.traffic for row in rows})
    console.print("cost model, kB on the wire per rank:", {name: round(size / 1e3) for name, size in cost.items()})
    print(json.dumps({"schema": 1, "options": vars(options), "cost": cost, "results": [asdict(row) for row in rows]}))
    return int(any(not relative(row.loss, rows[0].loss) <= TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
