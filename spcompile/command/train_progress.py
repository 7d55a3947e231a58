"""How `spcompile train` shows itself: a progress bar on a terminal, plain lines elsewhere, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from spcompile.command.train_report import TrainReport
from spcompile.plain_text import one_line

ShowStep = Callable[[str, int, float, float | None], None]  # phase, step, loss, relative difference to the other run
PLAIN_LINES = 6  # per run, where there is no terminal


@contextmanager
def step_progress(steps: int, shown: bool) -> Iterator[ShowStep]:
    """What to call after every step. Writes to stderr, so that stdout holds results only."""
    console = Console(stderr=True, highlight=False)
    if not shown:
        yield lambda phase, step, loss, difference: None
    elif console.is_terminal:
        with _bar(console) as bar:
            tasks = {}

            def advance(phase: str, step: int, loss: float, difference: float | None) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(phase, total=steps, note="")
                bar.update(tasks[phase], completed=step + 1, note=_note(loss, difference))

            yield advance
    else:

        def write(phase: str, step: int, loss: float, difference: float | None) -> None:
            if step == 0 or (step + 1) % max(1, steps // PLAIN_LINES) == 0:
                console.print(f"{phase:>10}  step {step + 1:>4}/{steps}  {_note(loss, difference)}")

        yield write


def _bar(console: Console) -> Progress:
    columns = [TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


def _note(loss: float, difference: float | None) -> str:
    return f"loss {loss:.6f}" + ("" if difference is None else f"  relative difference {difference:.1e}")


def print_report(report: TrainReport, console: Console) -> None:
    """Both runs side by side, the collectives of a step, and where the graphs lie."""
    job, single, parallel = report.job, report.single, report.parallel
    size = f"{report.parameters:,} parameters, {job.dtype}"
    console.print(f"{one_line(job.model)}, {size}: {job.steps} steps of {job.batch} x {job.seq} tokens")
    mesh = " ".join(f"{axis}={size}" for axis, size in job.mesh.items())
    runs = Table("", "one device, eager", f"{job.ranks} ranks, {mesh}, {one_line(job.backend)}")
    for column in runs.columns[1:]:
        column.justify = "right"
    runs.add_row("loss, first step", f"{single.losses[0]:.9f}", f"{parallel.losses[0]:.9f}")
    runs.add_row("loss, last step", f"{single.losses[-1]:.9f}", f"{parallel.losses[-1]:.9f}")
    runs.add_row("tokens/s", f"{single.tokens_per_second:,.0f}", f"{parallel.tokens_per_second:,.0f}")
    runs.add_row("first step (compiles), s", f"{single.first_seconds:.2f}", f"{parallel.first_seconds:.2f}")
    runs.add_row("saved for backward per rank, MB", _megabytes(single.saved_bytes), _megabytes(parallel.saved_bytes))
    console.print(runs)
    console.print(
        f"relative difference of the losses: at most {max(report.differences):.1e} at any step, "
        f"{report.differences[-1]:.1e} at the last (allowed {report.tolerance:.0e})"
    )
    if report.traffic:
        sent = Table("collectives of one step, per rank", "count", "MB")
        for row in report.traffic:
            sent.add_row(row.op, str(row.count), _megabytes(row.bytes))
        console.print(sent)
    else:
        console.print("collectives of one step: none")
    if job.dump is not None:
        console.print(f"graphs after every pass: {one_line(job.dump)}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f}"
