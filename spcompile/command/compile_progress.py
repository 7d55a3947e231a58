"""How `explain`, `plan` and `compare` show what they are at, on a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from spcompile.program.progress import shown_by

# Shares of the time of `explain`, measured on a Llama of 32 layers; a pass that is not named takes one.
_SHARES = {
    "building the model": 8,
    "tracing the model": 10,
    "reading the graph": 7,
    "lower": 5,
    "split-all-to-alls": 2,
    "forward and backward of one rank": 34,
    "planning memory": 12,
    "forward and backward of one device, to compare": 22,
}
_PASSES = 25  # that take one
_OF_MANY = re.compile(r"(\d+) of (\d+) done")


class Share:
    """How much is done, from what has begun: in hundredths. It goes back only where a next model is begun."""

    def __init__(self) -> None:
        self.done = 0.0
        self._now = 0.0
        self._all = sum(_SHARES.values()) + _PASSES

    def begin(self, what: str) -> float:
        """What is done when this begins."""
        if what == "tracing the model" and self.done >= 99:
            self.done = self._now = 0.0
        many = _OF_MANY.search(what)
        if many is not None:  # candidates of a plan
            self.done = max(self.done, 100 * int(many[1]) / max(1, int(many[2])))
            return self.done
        self.done = min(99.0, self.done + self._now)
        self._now = 100 * _SHARES.get(what, 1) / self._all
        return self.done


@contextmanager
def compile_progress() -> Iterator[None]:
    """A bar on stderr, with what is at work and for how long; it is gone at the end. On a terminal, and on rank 0."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    columns = (BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    share = Share()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("building the model", total=100)
        share.begin("building the model")
        with shown_by(lambda what: progress.update(task, description=what, completed=share.begin(what))):
            yield
