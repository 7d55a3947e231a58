"""The acceptance run on one NVIDIA GPU: everything that only a device can show, in less than nine minutes.

    python benchmarks/gpu.py [PART ...] [--json FILE] [--seconds 520] [--dry-run]

    kernels   every kind of attention, on the GPU in half precision and float32 against the CPU in float64, results and
              gradients, alone and carried over 2 to 16 hops
    speed     forward, backward and the ring step, in TFLOP/s, next to what else is there; bars are for an H100
    path      whole models, all ranks of many meshes in one process, every gradient against the plain model; one device
    ranks     two processes that share the GPU, over gloo
    share     one rank's part of a step on eight, with a process group that sends nothing: launches, reads of the host,
              seconds and peak of memory, measured next to what `explain` predicts

Without PART all of them, in this order. It prints a line with a verdict for each thing, and JSON at the end; a line
that failed names the command that runs it alone. What does not fit into --seconds is left out, and said so. --dry-run
goes the same way on CPUs, with small sizes: it shows that the run works, and nothing about GPUs. Exit status: 1 if a
line failed, 2 without a GPU.

Runs from the source tree, installed or not, with torch 2.11 or later and triton; it fetches nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


class _Mapped:
    """Finds `spcompile.passes` and `spcompile.models` beside the package, where nothing is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("spcompile.passes", "spcompile.models"):
            return None
        folder = ROOT / name.partition(".")[2]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


sys.meta_path.insert(0, _Mapped())  # type: ignore[arg-type]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_kernels import Place, Step, kernels, verdict  # noqa: E402
from torch import Tensor, nn  # noqa: E402

BARS = {"forward": 370.0, "backward": 220.0, "ring step": 95.0}  # TFLOP/s of one H100, and % of one kernel


@dataclass
class Line:
    """One thing that was tried. verdict: "pass", "fail", "measured" (nothing is promised), "left out"."""

    part: str
    what: str
    verdict: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.figures.items())
        text = f"{self.verdict.upper():9} {self.part:8} {self.what}" + (f": {figures}" if figures else "")
        return text + (f"\n          python benchmarks/gpu.py {self.part}" if self.verdict == "fail" else "")


# Speed


def speed(place: Place) -> Iterator[Step]:
    if place.small:
        yield "forward, backward, ring step", lambda: ("left out", {"why": "needs a GPU"})
        return
    import attention_gpu as bench

    shapes = [bench.Shape(64, 8, S, 128, True) for S in (8192, 32768)] + [bench.Shape(32, 32, 8192, 64, False)]

    def of(shape: Any, name: str, make: Any) -> tuple[str, dict[str, Any]]:
        found = bench.measured(functools.partial(make, shape), shape.flops)
        if "missing" in found:
            return ("fail" if name == "spcompile" else "left out"), found
        rates = {way: found[f"{way}_tflops"] for way in ("forward", "backward")}
        is_ours = name == "spcompile" and shape.D == 128
        is_fast = all(rate >= BARS[way] for way, rate in rates.items())
        return (verdict(is_fast) if is_ours else "measured"), rates

    for shape in shapes:
        kind = f"{'causal' if shape.causal else 'full'} d{shape.D} {shape.N}:{shape.G} {shape.S} tokens"
        for name, make in bench.METHODS.items():
            yield f"{name}, {kind}", functools.partial(of, shape, name, make)

    def step_of(shape: Any, hops: int) -> tuple[str, dict[str, Any]]:
        one = bench.measured(functools.partial(bench.ours, shape), shape.flops)
        many = bench.measured(functools.partial(bench.ring_step, shape, hops), shape.flops)
        parts = {way: 100 * one[f"{way}_ms"] / many[f"{way}_ms"] for way in ("forward", "backward")}
        return verdict(min(parts.values()) >= BARS["ring step"]), parts

    for hops in (2, 8):
        yield (
            f"ring step, % of one kernel, {hops} hops",
            functools.partial(step_of, bench.Shape(64, 8, 32768, 128, False), hops),
        )


# Models


def llama(place: Place, dtype: torch.dtype, layers: int = 2) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from spcompile import models
    from spcompile.models.llama import LlamaConfig

    torch.manual_seed(0)
    size = {"dim": 64, "hidden": 96, "vocab": 64} if place.small else {"dim": 1024, "hidden": 2816, "vocab": 4096}
    config = LlamaConfig(layers=layers, heads=8, kv_heads=4, **size)
    model = models.llama.build(config).to(place.device, dtype)
    ids = torch.randint(0, config.vocab, (2, 63 if place.small else 1023), device=place.device)
    return model, (ids, ids)


def hf_llama(place: Place, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = 64 if place.small else 512
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=512, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(place.device, dtype)
    ids = torch.randint(0, 512, (2, 61), device=place.device)
    attention_mask = torch.ones_like(ids).index_fill(1, torch.arange(5, device=place.device), 0)
    return model, {"input_ids": ids, "labels": ids, "attention_mask": attention_mask}


def verified(make: Callable[[], Any], mesh: dict[str, int], **options: Any) -> tuple[str, dict[str, Any]]:
    from spcompile import verify

    model, inputs = make()
    report = verify(model, inputs, mesh=mesh, **options)
    worst = max(report.rows, key=lambda row: row.relative if row.relative == row.relative else float("inf"))
    return verdict(report.ok), {"tensors": len(report.rows), "worst": worst.name, "error": float(worst.relative)}


def loss_of(found: Any) -> Tensor:
    """The scalar among what a model returns."""
    outputs = found if isinstance(found, tuple) else (found,)
    return next(x for x in outputs if isinstance(x, Tensor) and x.ndim == 0)


def compiled_alone(make: Callable[[], Any]) -> tuple[str, dict[str, Any]]:
    """World size 1, against the plain model in float32: loss and every gradient."""
    import copy

    model, inputs = make()
    named = inputs if isinstance(inputs, dict) else {}
    values = () if named else inputs
    plain = copy.deepcopy(model)
    model.compile(backend="spcompile")
    losses, gradients = [], []
    for one in (plain, model):
        loss = loss_of(one(*values, **named))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad for p in one.parameters()])
    errors = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in zip(*gradients, strict=True)]
    return verdict(max(errors) < 1e-3), {"plain loss": losses[0], "loss": losses[1], "gradient error": max(errors)}


def path(place: Place) -> Iterator[Step]:
    single, half = torch.float32, torch.bfloat16
    meshes: list[tuple[dict[str, int], dict[str, Any]]] = [
        ({"cp": 4}, {"attention": "ring"}),
        ({"cp": 4}, {"attention": "ulysses"}),
        ({"cp": 4}, {"attention": {"ulysses": 2, "ring": 2}}),
        ({"tp": 2, "cp": 2}, {"attention": "ring"}),
    ]
    yield (
        "models:llama, one device, float32",
        functools.partial(compiled_alone, functools.partial(llama, place, single)),
    )
    for dtype in (single,) if place.small else (single, half):
        tolerance = {"tolerance": 1e-4} if dtype == single else {}
        for mesh, options in meshes[:2] if place.small else meshes:
            make = functools.partial(llama, place, dtype)
            what = f"models:llama, {mesh}, {options['attention']}, {str(dtype)[6:]}"
            yield what, functools.partial(verified, make, mesh, **options, **tolerance)
    if importlib.util.find_spec("transformers") is None:
        yield "hf:llama", lambda: ("left out", {"why": "transformers is not installed"})
        return
    make_hf = functools.partial(hf_llama, place, single)
    yield (
        "hf:llama with left padding, cp=4, ring",
        functools.partial(verified, make_hf, {"cp": 4}, attention="ring", tolerance=1e-4),
    )


# Ranks that share a GPU


def one_rank(rank: int, world: int, store: str, device: str, attention: str) -> None:
    """Loss and gradients of a compiled model on one of the processes, against the plain model; prints JSON."""
    import copy

    from torch.distributed.device_mesh import init_device_mesh

    place = Place(device, small=True)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model, inputs = llama(place, torch.float32)
    plain = copy.deepcopy(model)
    axis, options = ("tp", {}) if attention == "tp" else ("cp", {"attention": attention})
    mesh = init_device_mesh(device, (world,), mesh_dim_names=(axis,))
    model.compile(backend="spcompile", options={"mesh": mesh, "compiler": "eager", "outputs": "loss", **options})
    for one in (plain, model):
        loss_of(one(*inputs)).backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    errors = [float((a.grad - b.grad).abs().max() / a.grad.abs().max().clamp(min=1e-6)) for a, b in pairs]
    print(json.dumps({"error": max(errors)}))
    dist.destroy_process_group()


def shared_gpu(place: Place, attention: str, world: int = 2) -> tuple[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, __file__, "--rank", json.dumps([rank, world, f"{folder}/store", place.device, attention])]
            for rank in range(world)
        ]
        ranks = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
        try:
            outs = [rank.communicate(timeout=600 if place.small else 150) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    if any(rank.returncode for rank in ranks):
        return "fail", {"why": next(err for _, err in outs if err).strip().splitlines()[-1][:200]}
    error = max(json.loads(out.splitlines()[-1])["error"] for out, _ in outs)
    return verdict(error < 1e-3), {"gradient error": error}


def ranks(place: Place) -> Iterator[Step]:
    for attention in ("ring",) if place.small else ("ring", "ulysses", "tp"):
        yield f"two processes over gloo, {attention}", functools.partial(shared_gpu, place, attention)


# One rank's share


def share_of_eight(place: Place, attention: str, compiler: str) -> tuple[str, dict[str, Any]]:
    """A step of rank 0 of eight: nothing is sent, so that what is left is what one rank launches, reads and keeps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.profiler import ProfilerActivity, profile
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (defines the backend)

    from spcompile import explain
    from spcompile.program.own_group import OwnGroup

    def alone(self: OwnGroup, numbers: Any, where: str, mark: str) -> dict[int, list[int]]:
        return {rank: list(numbers) for rank in self.ranks}

    model, inputs = llama(place, torch.float32 if place.small else torch.bfloat16, layers=2)
    options = {"attention": attention, "compiler": compiler, "outputs": "loss"}
    plan = explain(model, inputs, mesh={"cp": 8}, **options)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=8)
    try:
        # Such a group has no other ranks to compare with, and no timeout.
        no_timeout = mock.patch("spcompile.torch_private_groups.group_timeout", return_value=timedelta(minutes=5))
        with mock.patch.object(OwnGroup, "gather", alone), no_timeout:
            mesh = init_device_mesh(place.device, (8,), mesh_dim_names=("cp",))
            model.compile(backend="spcompile", options={**options, "mesh": mesh, "compare": "compile"})

            def step() -> None:
                loss_of(model(*inputs)).backward()

            for _ in range(2):
                step()
            place.synchronize()
            if place.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step()
            place.synchronize()
            seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated() if place.device == "cuda" else 0
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if place.device == "cuda" else [])
            with profile(activities=activities) as profiled:
                step()
                place.synchronize()
    finally:
        dist.destroy_process_group()
    names = [event.name for event in profiled.events()]
    syncs = sum(name in ("cudaStreamSynchronize", "cudaMemcpy", "aten::_local_scalar_dense") for name in names)
    figures = {
        "ms": 1e3 * seconds,
        "predicted ms": 1e3 * plan.predicted.total("seconds"),
        "launches": sum("LaunchKernel" in name for name in names),
        "reads of the host": syncs,
        "peak MiB": peak / 2**20,
        "predicted peak MiB": float(plan.memory.peak_bytes) / 2**20,
    }
    return "measured", figures


def share(place: Place) -> Iterator[Step]:
    for attention in ("ring",) if place.small else ("ring", "ulysses"):
        compiler = "eager" if place.small else "inductor"
        yield f"rank 0 of cp=8, {attention}, {compiler}", functools.partial(share_of_eight, place, attention, compiler)


PARTS: dict[str, Callable[[Place], Iterator[Step]]] = {
    "kernels": kernels, "speed": speed, "path": path, "ranks": ranks, "share": share,
}  # fmt: skip


def attempt(part: str, what: str, step: Callable[[], tuple[str, dict[str, Any]]]) -> Line:
    """The line of a step; what it raises is its failure."""
    try:
        return Line(part, what, *step())
    except Exception as error:
        text = " ".join(str(error).split())
        return Line(part, what, "fail", {"why": f"{type(error).__name__}: {text}"[:400]})


def run(parts: list[str], place: Place, limit: float) -> list[Line]:
    started, lines = time.monotonic(), list[Line]()
    for part in parts:
        for what, step in PARTS[part](place):
            if time.monotonic() - started > limit:
                line = Line(part, what, "left out", {"why": f"{limit:g} s are over"})
            else:
                line = attempt(part, what, step)
            lines.append(line)
            print(line, flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to run; all by default")
    parser.add_argument("--json", type=Path, help="write all lines to this file instead of printing them")
    parser.add_argument("--seconds", type=float, default=520, help="start nothing new after so long")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on CPUs")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        one_rank(*json.loads(given.rank))
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        print("gpu.py needs an NVIDIA GPU, and torch sees none: nothing was tried. --dry-run shows what would be.")
        return 2
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
    place = Place("cpu" if given.dry_run else "cuda", given.dry_run)
    about = {"torch": torch.__version__, "device": "cpu" if given.dry_run else torch.cuda.get_device_name()}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    started = time.monotonic()
    lines = run(given.parts or list(PARTS), place, given.seconds)
    failed = sum(line.verdict == "fail" for line in lines)
    print(f"{len(lines)} lines, {failed} failed, {time.monotonic() - started:.0f} s")
    report = json.dumps({**about, "dry_run": given.dry_run, "lines": [asdict(line) for line in lines]})
    if given.json:
        given.json.write_text(report)
    else:
        print(report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
