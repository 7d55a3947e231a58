"""How `spcompile explain` shows what it is at, on a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from spcompile.program.progress import shown_by


@contextmanager
def compile_progress() -> Iterator[None]:
    """What a compile does and for how long, on stderr; it is gone at the end. Only on a terminal, and on rank 0."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building the model", total=None)
        with shown_by(lambda what: progress.update(task, description=what)):
            yield
