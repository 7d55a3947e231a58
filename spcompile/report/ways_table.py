"""What `spcompile.compare` returns: one row for each way to use the ranks, three columns for each length."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.durations import ms_text
from spcompile.memory.planner import Wish
from spcompile.options import Options
from spcompile.plain_text import one_line
from spcompile.planning.ways import NAMES, Way

WAYS_SCHEMA_VERSION = 1
_GIB = 1 << 30


@dataclass(frozen=True)
class WaysTable:
    """Memory, bytes sent and seconds of a step on one rank. lengths: tokens of a row -> ways, in the order of NAMES."""

    model: str
    world: int
    options: Options
    lengths: Mapping[int, Sequence[Way]]
    entries: int

    def __add__(self, other: WaysTable) -> WaysTable:
        """The same with further lengths."""
        return replace(self, lengths={**self.lengths, **other.lengths})

    def best(self, tokens: int) -> str:
        """The fastest way that fits, by name; "" if none does."""
        fitting = [way for way in self.lengths[tokens] if way.result is not None and way.result.fits]
        return min(fitting, key=_seconds).name if fitting else ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "schema_version": WAYS_SCHEMA_VERSION,
            "model": self.model,
            "world": self.world,
            "limit_bytes": Wish.of(self.options, self.world).bytes,
            "lengths": [
                {"tokens": tokens, "best": self.best(tokens), "ways": [_way_dict(way) for way in rows]}
                for tokens, rows in self.lengths.items()
            ],
        }

    def __str__(self) -> str:
        out = io.StringIO()
        width = 24 + 36 * len(self.lengths)
        console = Console(file=out, width=width, highlight=False, color_system=None, markup=False, emoji=False)
        console.print(self._table())
        for line in self._notes():
            console.print(line, soft_wrap=True)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def _table(self) -> Table:
        limit = Wish.of(self.options, self.world).bytes
        at_most = "" if limit is None else f", {bytes_text(limit)} on each"
        title = one_line(
            f"{self.model}, batch {self.entries}, {self.world} ranks of {self.options.accelerator}{at_most}"
        )
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("")
        for tokens in self.lengths:
            table.add_column(f"{tokens:,} tokens\nmemory GiB", justify="right")
            table.add_column("\nsent GiB", justify="right")
            table.add_column("\nms", justify="right")
            table.add_column("\n")
        for place, name in enumerate(NAMES):
            ways = [rows[place] for rows in self.lengths.values()]
            cells = [cell for tokens, way in zip(self.lengths, ways, strict=True) for cell in self._cells(tokens, way)]
            table.add_row(name, *cells)
        return table

    def _cells(self, tokens: int, way: Way) -> list[str]:
        if way.result is None or way.result.figures is None:
            return ["-", "-", "-", ""]
        found = way.result.figures
        mark = "does not fit" if not way.result.fits else "*" if way.name == self.best(tokens) else ""
        return [f"{found.total / _GIB:,.2f}", f"{found.sent_bytes / _GIB:,.2f}", ms_text(found.seconds), mark]

    def _notes(self) -> list[str]:
        lines = ["", "*          the fastest that fits", f"Assumed    {ACCELERATORS[self.options.accelerator]}"]
        lines.append(f"Assumed    memory with the states of {self.options.optimizer}; a step without the optimizer")
        lines.append("Assumed    parameters are split: by spcompile.parallelize over tp, with shard_parameters over cp")
        for place, name in enumerate(NAMES):
            ways = {tokens: rows[place] for tokens, rows in self.lengths.items()}
            factors = {tokens: way.result.candidate.attention_text for tokens, way in ways.items() if way.result}
            if name == "cp hybrid" and factors:
                told = ", ".join(f"{text} at {tokens:,}" for tokens, text in factors.items())
                lines.append(f"Hybrid     {told if len(set(factors.values())) > 1 else next(iter(factors.values()))}")
            for why in dict.fromkeys(way.why_not for way in ways.values() if way.why_not):
                lines.append(f"Left out   {name}: {one_line(why.splitlines()[0])}")
        return lines


def _seconds(way: Way) -> float:
    assert way.result is not None
    assert way.result.figures is not None
    return way.result.figures.seconds


def _way_dict(way: Way) -> dict[str, Any]:
    result = way.result
    if result is None or result.figures is None:
        return {"name": way.name, "why_not": way.why_not}
    found = result.figures
    return {
        "name": way.name,
        "mesh": dict(result.candidate.mesh),
        "options": result.candidate.options,
        "shard_parameters": list(result.candidate.shard),
        "memory_bytes": round(found.total),
        "sent_bytes": round(found.sent_bytes),
        "seconds": found.seconds,
        "again_seconds": found.again,
        "fits": result.fits,
    }
