"""`spcompile train`: train a model on all ranks, compiled, and the same model on one, as it is, and compare.

The plain model runs first, on rank 0 with all cores. Then every rank trains the compiled one on the same batches.
B batch, S sequence.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from spcompile.collectives.counting import count_collectives
from spcompile.command import model_spec
from spcompile.command.arguments import MOST_PROCESSES, require_file
from spcompile.command.interrupts import end_silently, interrupts_for_this_process_alone
from spcompile.command.train_progress import ShowStep, step_progress
from spcompile.command.train_report import TrainingRun, TrainJob, TrainReport, relative
from spcompile.diagnostics import IllegalMesh, IllegalModel, IllegalOption
from spcompile.machine.host import cores
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.program.dump import cannot_write, require_room
from spcompile.schedule.saved_bytes import saved_activation_bytes

if TYPE_CHECKING:
    from spcompile.command.model_spec import BuiltModel


def read_text(file: str | None) -> bytes:
    """The bytes of a file; without one, the text of Python's own language reference, which every Python has."""
    if file is not None:
        return Path(file).read_bytes()
    return "\n".join(importlib.import_module("pydoc_data.topics").topics.values()).encode()


def check(job: TrainJob) -> None:
    """Find what cannot work before any process is started.

    Raises:
        IllegalModel, IllegalOption, UnknownOption, IllegalMesh: with what would be legal.
    """
    shape = MeshShape.of(job.mesh)
    most = max(MOST_PROCESSES, cores())
    if shape.world_size > most:
        raise IllegalMesh(f"{shape}: {shape.world_size} processes", legal=f"at most {most} on this machine")
    Options.parse(job.options).require_factors(job.mesh.get("cp", 1))
    built = model_spec.build_model(job.model, seq=job.seq, device="meta", dtype=job.dtype, settings=job.settings)
    if built.vocab < 256:
        raise IllegalModel(f"a vocabulary of {built.vocab} for bytes", legal="at least 256")
    if job.batch % job.mesh.get("dp", 1):
        raise IllegalOption(f"batch={job.batch}", legal=f"a multiple of the dp axis, {job.mesh['dp']}")
    if job.steps < 2 or job.seq < 2:
        raise IllegalOption(f"steps={job.steps} seq={job.seq}", legal="at least 2 of each")
    require_file("--text", Path(job.text) if job.text is not None else None)
    length = len(read_text(job.text))
    if length <= job.seq:
        raise IllegalOption(f"a text of {length} bytes", legal=f"more than seq={job.seq}")
    if job.dump is not None:
        try:
            require_room(Path(job.dump))
        except (OSError, ValueError) as error:
            raise cannot_write(job.dump, error) from error


def launch(job: TrainJob) -> TrainReport:
    """Run the job on `job.ranks` new processes.

    Raises:
        SpcompileError: before any process is started.
        ChildFailedError: a process failed; the launcher has printed its traceback.
    """
    check(job)
    return on_processes(job.ranks, train_rank, job)[0]


def on_processes(ranks: int, function: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """Call `function(*arguments)` in `ranks` new processes of this machine, as torchrun would; results by rank.

    `function` calls `join_processes` first. Under `__main__` it needs the usual `if __name__ == "__main__"` guard.

    Raises:
        ChildFailedError: a process failed; the launcher has printed its traceback.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the trace observer of traffic.py announces itself
    # Threads that wait for each other sleep: by default they spin, which halves the speed where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="spcompile",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",  # Ctrl-C is ours
    )
    with interrupts_for_this_process_alone():
        return elastic_launch(config, _process)(function, *arguments)


def _process(function: Callable[..., Any], *arguments: Any) -> Any:
    end_silently()
    return function(*arguments)


@contextmanager
def join_processes(timeout: timedelta = timedelta(minutes=30)) -> Iterator[str]:
    """The process group of `on_processes`: NCCL where every rank has a GPU, else gloo; yields the device type."""
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def train_rank(job: TrainJob) -> TrainReport | None:
    """What each process does; the report is rank 0's."""
    with join_processes() as device, step_progress(job.steps, shown=dist.get_rank() == 0) as show:
        return _compare(job, device, show)


def _compare(job: TrainJob, device: str, show: ShowStep) -> TrainReport | None:
    rank = dist.get_rank()
    single: list[TrainingRun | None] = [None]
    if rank == 0:
        torch.set_num_threads(cores())
        plain = _build(job, device)
        batches = Batches(job, plain, device)
        single[0] = _train(job, plain, batches, lambda step, loss: show("one device", step, loss, None))
    dist.broadcast_object_list(single, src=0)
    reference = single[0]
    assert reference is not None

    torch.set_num_threads(max(1, cores() // job.ranks))
    mesh = init_device_mesh(device, tuple(job.mesh.values()), mesh_dim_names=tuple(job.mesh))
    built = _build(job, device)
    options = {**job.options, "mesh": mesh, "dump": job.dump if rank == 0 else None}
    built.model.compile(backend=job.backend, options=options if job.backend == "spcompile" else None)
    dp_rank = mesh.get_local_rank("dp") if "dp" in job.mesh else 0
    batches = Batches(job, built, device, dp_rank, job.mesh.get("dp", 1))

    def show_ranks(step: int, loss: float) -> None:
        show(f"{job.ranks} ranks", step, loss, relative(loss, reference.losses[step]))

    parallel = _train(job, built, batches, show_ranks)
    traffic = count_collectives(lambda: _loss(built, batches(0)).backward())
    losses: list[list[float]] = [[] for _ in range(job.ranks)]
    dist.all_gather_object(losses, parallel.losses)
    if rank != 0:
        return None
    differences = [relative(mine, other) for mine, other in zip(parallel.losses, reference.losses, strict=True)]
    parameters = sum(p.numel() for p in built.model.parameters())
    agree = all(other == losses[0] for other in losses)
    return TrainReport(job, parameters, reference, parallel, traffic, differences, agree)


def _train(job: TrainJob, built: BuiltModel, batches: Batches, show: Callable[[int, float], None]) -> TrainingRun:
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=job.lr, fused=True)
    losses, seconds = [], []
    for step in range(job.steps):
        start = time.perf_counter()
        loss = _loss(built, batches(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        show(step, losses[-1])
    step_seconds = statistics.median(seconds[1:])
    inputs = batches(0)
    saved = saved_activation_bytes(built.model, lambda: _loss(built, inputs))
    return TrainingRun(losses, seconds[0], step_seconds, saved, job.batch * job.seq / step_seconds)


def _loss(built: BuiltModel, inputs: dict[str, Tensor]) -> Tensor:
    output: Any = built.model(**inputs)
    return output if isinstance(output, Tensor) else output.loss


def _build(job: TrainJob, device: str) -> BuiltModel:
    """The model of the job, with the same weights at every call and on every rank."""
    torch.manual_seed(job.seed)
    return model_spec.build_model(job.model, seq=job.seq, device=device, dtype=job.dtype, settings=job.settings)


class Batches:
    """step -> the model's arguments: windows of the text at places drawn from the seed; a dp rank takes its entries."""

    def __init__(self, job: TrainJob, built: BuiltModel, device: str, dp_rank: int = 0, dp_size: int = 1) -> None:
        self.job, self.built, self.device, self.dp_rank, self.dp_size = job, built, device, dp_rank, dp_size
        self.text = torch.frombuffer(bytearray(read_text(job.text)), dtype=torch.uint8)

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The arguments of this step's call, the same for both runs."""
        torch.manual_seed(self.job.seed * 1_000_003 + step)
        starts = torch.randint(len(self.text) - self.job.seq, (self.job.batch,))
        ids_BS = torch.stack([self.text[start : start + self.job.seq] for start in starts.tolist()]).long()
        inputs = self.built.inputs(ids_BS)  # masks are drawn for the whole batch, so that every dp size has the same
        return {name: value.chunk(self.dp_size)[self.dp_rank].to(self.device) for name, value in inputs.items()}
