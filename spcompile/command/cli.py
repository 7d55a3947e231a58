"""The command line: train, plan, compare, timeline, calibrate, explain, verify, diff, passes, doctor. Imports wait."""

from __future__ import annotations

import dataclasses
import json as json_text
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from spcompile.command.arguments import (
    MOST_PROCESSES,
    MOST_TOKENS,
    backend_options,
    parse_attention,
    parse_dtype,
    parse_mesh,
    parse_options,
    parse_settings,
    parse_tokens,
    require_between,
    require_file,
    require_model,
    require_place_for_file,
    require_rate,
)
from spcompile.command.calibrate_command import calibrate
from spcompile.command.compare_command import compare
from spcompile.command.diff_command import diff
from spcompile.command.flags import Attention, Dtype, InOneProcess, Json, Length, OnMesh, Options, Settings, Sizes
from spcompile.command.interrupts import STATUS
from spcompile.command.plan_command import plan
from spcompile.command.timeline_command import timeline
from spcompile.diagnostics import IllegalMesh, IllegalOption, SpcompileError
from spcompile.machine.mesh import MOST_RANKS
from spcompile.plain_text import one_line, some_lines
from spcompile.program.collection import rare_collection

if TYPE_CHECKING:
    from spcompile.passes_api import Pass

app = App(
    name="spcompile",
    help="Turn a plain single-GPU transformer into a sequence-parallel one.\n\n"
    "MODEL is models:NAME (a plain model that comes along), hf:TYPE (a small model of a transformers type) "
    "or hf:FOLDER (built from the folder's config.json, random weights).",
    suppress_keyboard_interrupt=False,
)

app.command(plan)
app.command(compare)
app.command(timeline)
app.command(calibrate)
app.command(diff)


@app.command
def train(
    model: str,
    /,
    *,
    nproc: int | None = None,
    mesh: Sizes = None,
    text: Path | None = None,
    steps: int = 60,
    seq: Length = "1024",
    batch: int = 1,
    lr: float = 1e-3,
    seed: int = 0,
    attention: Attention = "auto",
    compiler: str = "inductor",
    dtype: Dtype = "float32",
    dump: Path | None = None,
    settings: Settings = None,
    option: Options = None,
    backend: Annotated[str, Parameter(show=False)] = "spcompile",
    json: Json = False,
) -> int:
    """Train MODEL on several ranks of this machine and on one device, and compare the losses.

    Exits with 1 if the losses differ by more than rounding at any step.

    Args:
        model: The model, see above.
        nproc: Number of processes; without --mesh they form one cp axis. Default 2.
        text: A file whose bytes are the tokens. Default: Python's language reference.
        steps: Training steps of each run.
        batch: Rows in a batch.
        lr: AdamW's learning rate.
        seed: Of weights and batches.
        compiler: The backend's option: inductor or eager.
        dump: A folder for the graph after every pass.
    """
    sizes = parse_mesh(mesh) if mesh else {"cp": 2 if nproc is None else nproc}
    for name, number, least, most in (
        ("--nproc", nproc, 1, MOST_RANKS),
        ("--steps", steps, 2, MOST_TOKENS),
        ("--batch", batch, 1, MOST_TOKENS),
        ("--seed", seed, 0, MOST_TOKENS),
    ):
        require_between(name, number, least, most)
    require_rate("--lr", lr)
    require_file("--text", text)
    tokens, dtype = parse_tokens("--seq", seq, 2), parse_dtype(dtype)
    require_model(model)
    given = parse_settings(settings or [])
    asked = {"attention": parse_attention(attention), "compiler": compiler, **parse_options(option or [])}
    options = backend_options(asked, sizes)
    check_model(model, given)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from spcompile.command.train import launch
    from spcompile.command.train_progress import print_report
    from spcompile.command.train_report import TrainJob

    job = TrainJob(
        model=model,
        mesh=sizes,
        steps=steps,
        seq=tokens,
        batch=batch,
        lr=lr,
        dtype=dtype,
        seed=seed,
        text=str(text) if text else None,
        settings=given,
        options=options,
        dump=str(dump.resolve()) if dump else None,
        backend=backend,
    )
    if nproc is not None and nproc != job.ranks:
        raise IllegalMesh(f"--mesh of {job.ranks} ranks with --nproc {nproc}", legal=f"--nproc {job.ranks}, or none")
    try:
        report = launch(job)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        _say(f"FAILED: rank {rank} ended with exit code {first.exitcode}, see above")
        return 1
    except SignalException as ended:
        _say(f"ended by {ended.sigval.name}")
        return 128 + ended.sigval
    if json:
        print(json_text.dumps(report.to_dict()))
    else:
        print_report(report, Console(highlight=False, markup=False, emoji=False))
    for failure in report.failures:
        _say(f"FAILED: {failure}")
    return 1 if report.failures else 0


@app.command
def explain(
    model: str,
    /,
    *,
    step: OnMesh = OnMesh(),
    html: Path | None = None,
    graph: str | None = None,
    all_layers: bool = False,
    json: Json = False,
) -> int:
    """Tell what would be computed, sent and kept where; needs no devices.

    Equal layers are compiled once, and the report says so; all are with --html, --graph and --all-layers.

    Args:
        model: The model, see above.
        html: Also write the plan as an HTML page, with the graph after every pass.
        graph: Print the graph after this pass instead ("forward", "backward": the final ones).
        all_layers: Compile all layers, also those that are equal.
    """
    asked = step.asked(model, ["shard_parameters"])
    require_place_for_file("--html", html)

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    _require_graph(graph, asked.options.get("plugins", ""))
    with compile_progress():
        built, inputs = built_with_inputs(model, asked.tokens, asked.batch, asked.dtype, "meta", asked.settings)
        whole = all_layers or html is not None or graph is not None
        plan = spcompile.explain(built, inputs, mesh=asked.sizes, fold_layers=not whole, **asked.options)
    if html is not None:
        plan.save(str(html))
    if graph is not None:
        if graph not in plan.graphs:
            raise IllegalOption(f"--graph {graph!r}", legal=", ".join(plan.graphs))
        print(plan.graph(graph), end="")
    else:
        print(json_text.dumps(plan.to_dict()) if json else str(plan))
    return 0


@app.command
def verify(
    model: str,
    /,
    *,
    step: InOneProcess = InOneProcess(),
    json: Json = False,
) -> int:
    """Run all ranks in this process and compare loss, outputs and gradients with the plain model's.

    Exits with 1 if one of them differs.

    Args:
        model: The model, see above.
    """
    asked = step.asked(model, ["tolerance"])

    import spcompile
    from spcompile.command.model_spec import built_with_inputs

    built, inputs = built_with_inputs(model, asked.tokens, asked.batch, asked.dtype, "cpu", asked.settings)
    report = spcompile.verify(built, inputs, mesh=asked.sizes, **asked.options)
    print(json_text.dumps(report.to_dict()) if json else str(report))
    return 0 if report.ok else 1


@app.command
def passes(*, plugins: str = "", json: Json = False) -> int:
    """List the passes in the order in which they run, with what must run before them and their options.

    Args:
        plugins: The backend's option: modules with passes of their own, as a,package.b.
    """
    pipeline = pipeline_with(plugins)

    rows: list[dict[str, Any]] = [
        {
            "name": p.name,
            "stage": p.stage.value,
            "summary": p.summary,
            "after": sorted(p.after),
            "options": {field.name: getattr(p, field.name) for field in dataclasses.fields(p)},
        }
        for p in pipeline
    ]
    if json:
        print(json_text.dumps(rows, default=str))
        return 0
    for row in rows:
        print(f"{row['stage']:<9} {row['name']:<22} {row['summary']}")
        options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
        for label, text in (("after", ", ".join(row["after"])), ("options", options)):
            if text:
                print(f"{'':<32} {label}: {text}")
    return 0


@app.command
def doctor(*, nproc: int | None = None, json: Json = False) -> int:
    """Tell what this machine has and lacks, and check every collective between ranks.

    Under torchrun (`torchrun --nproc-per-node 8 --no-python spcompile doctor`) the ranks are those of the run, on all
    its machines. Exits with 1 if something is wrong.

    Args:
        nproc: Processes that are started here. Default: one for each GPU, else 2.
    """
    require_between("--nproc", nproc, 1, MOST_PROCESSES)
    is_launched = "LOCAL_WORLD_SIZE" in os.environ
    if is_launched and nproc is not None:
        raise IllegalOption(f"--nproc {nproc} under torchrun", legal="torchrun's --nproc-per-node alone")

    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from spcompile.command import doctor as checkup
    from spcompile.command.doctor_ranks import check_ranks
    from spcompile.command.train import on_processes

    try:
        of_ranks = (
            check_ranks() if is_launched else on_processes(nproc or torch.cuda.device_count() or 2, check_ranks)[0]
        )
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        _say(f"FAILED: rank {rank} ended with exit code {first.exitcode}, see above")
        return 1
    found = [*checkup.findings(), *checkup.findings_of_ranks(of_ranks)]
    if os.environ.get("RANK", "0") == "0":
        text = json_text.dumps({"schema_version": 1, "findings": checkup.as_dicts(found)})
        print(text if json else "\n".join(checkup.lines_of(found)))
    return 1 if any(one.ok is False for one in found) else 0


def check_model(model: str, settings: dict[str, Any]) -> None:
    """Find what is wrong with a plain model's settings before the launcher of processes is imported."""
    from spcompile.command import model_spec

    if model.startswith("models:"):
        model_spec.plain_config(model.removeprefix("models:"), settings)


def pipeline_with(plugins: str) -> tuple[Pass, ...]:
    """The passes of a compile with these plugins."""
    from spcompile.options import Options as BackendOptions
    from spcompile.passes import PIPELINE
    from spcompile.program.plugins import with_plugins

    return with_plugins(PIPELINE, BackendOptions.parse({"plugins": plugins} if plugins else {}))


def _require_graph(name: str | None, plugins: str) -> None:
    """Raises IllegalOption for what is no name of a graph on any mesh, before one is made."""
    names = ["capture", *(p.name for p in pipeline_with(plugins)), "forward", "backward"]
    if name is not None and name.removesuffix(" (backward)") not in names:
        raise IllegalOption(f"--graph {name!r}", legal=", ".join(names))


def main() -> None:
    """The console script. A user's error and Ctrl-C are told without a traceback; the status is then 2, or 130."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever downloaded
    try:
        with rare_collection():  # importing torch makes a million objects that stay
            status = app(sys.argv[1:], result_action="return_value", exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except SpcompileError as error:
        _say(_as_line(error))
        status = 2
    except CycloptsError as error:
        _say(one_line(" ".join(str(error).split())))
        status = 2
    except KeyboardInterrupt:
        _say("interrupted")
        status = STATUS
    except BrokenPipeError:  # who reads has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _as_line(error: SpcompileError) -> str:
    """An error of a few words in one line; one that shows a line of a model, or several ranks, in several."""
    if error.where is not None or "\n" in error.found:
        return str(error)
    legal = f"; legal: {error.legal}" if error.legal is not None else ""
    return f"{error.code} {error.title}: {error.found}{legal}"


def _say(text: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.show_cursor(True)  # a progress bar that was ended had hidden it
    console.print(some_lines(text), markup=False, emoji=False, soft_wrap=True)
