"""The planner held to account: what it predicts beside what others measured, with the error of every row.

    python benchmarks/planner.py [--part figure7 tables alst runs] [--models 22B 175B 530B 1T] [--json]

figure7  bytes that a layer keeps for the backward, Korthikanti et al. figure 7, with their dropout, from graphs that
         this compiler captured, sharded and cut (benchmarks/held_scores.py). Bars: mean error 0.5%, worst 1%.
tables   milliseconds of a layer (table 4) and seconds of a step (table 5) of their 22B model on A100. Bar: worst 5%.

alst     seconds of ALST's table 1, and what a rank takes at the longest length that fitted there. Bar of seconds: 15%.
runs     UPipe, torchtitan, and ring against Ulysses on H200s, without a bar.

In tables nothing is fitted. Three constants are, each to one row, which has no error then: what the attention kernels
of ALST reach, and those of torchtitan, and what ALST's optimizer takes on the host. All other speeds are those of
spcompile/machine/hardware.json. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from held_scores import layer_milliseconds, saved_by_a_layer, step_seconds
from published import FIGURE_7, KORTHIKANTI, TABLE_4, TABLE_5, WAYS
from published_runs import (
    ALST,
    ALST_FITTED,
    ALST_OPTIMIZER_FITTED,
    RING_AGAINST_ULYSSES,
    TORCHTITAN,
    TORCHTITAN_FITTED,
    UPIPE,
    prepared,
    reached_beside_optimizer,
    reached_by_attention,
    ring_and_ulysses_percent,
)
from rich.console import Console
from rich.table import Table

GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One figure. published: as measured by others; None: there is none. note: what differs between the two."""

    what: str
    unit: str
    predicted: float
    published: float | None
    note: str = ""

    @property
    def error(self) -> float | None:
        """Relative to what was measured."""
        return None if self.published is None else self.predicted / self.published - 1


@dataclass(frozen=True)
class Part:
    """rows and the bars that their errors must keep; None: no bar."""

    rows: list[Row]
    mean_bar: float | None
    worst_bar: float | None

    @property
    def errors(self) -> list[float]:
        """Sizes of all errors that are known; of rows that are 1 by definition none is."""
        return [abs(row.error) for row in self.rows if row.error is not None]

    @property
    def mean(self) -> float:
        """Of all errors."""
        return sum(self.errors) / len(self.errors)

    @property
    def worst(self) -> float:
        """Of all errors."""
        return max(self.errors)

    @property
    def holds(self) -> bool:
        """Whether every bar is kept."""
        bars = ((self.mean, self.mean_bar), (self.worst, self.worst_bar))
        return all(bar is None or found <= bar for found, bar in bars)


def figure7(models: Sequence[str]) -> Part:
    """Bytes of a layer, in percent of tensor parallelism alone."""
    rows = []
    for name in models:
        alone = saved_by_a_layer(KORTHIKANTI[name], "none")
        for way in WAYS:
            if way == "none":
                continue  # 100% by definition
            found = 100 * saved_by_a_layer(KORTHIKANTI[name], way) / alone
            rows.append(Row(f"{name}, {way}", "%", found, FIGURE_7[name][way]))
    return Part(rows, 0.005, 0.01)


def tables(models: Sequence[str]) -> Part:
    """Seconds of the 22B model, whatever models are named."""
    model, rows = KORTHIKANTI["22B"], []
    for way in WAYS:
        found = layer_milliseconds(model, way)
        for phase, predicted, measured in zip(("forward", "backward"), found, TABLE_4[way], strict=True):
            rows.append(Row(f"a layer, {way}, {phase}", "ms", predicted, measured))
    rows += [Row(f"a step, {way}", "s", step_seconds(model, way), TABLE_5[way]) for way in TABLE_5]
    return Part(rows, None, 0.05)


def alst(models: Sequence[str]) -> Part:
    """Whatever models are named: Llama 3.1 8B."""
    made = {run.name: prepared(run) for run in ALST}
    reached, optimizer = reached_beside_optimizer(made[ALST_FITTED], made[ALST_OPTIMIZER_FITTED])
    fitted = {
        ALST_FITTED: f"fitted: attention reaches {reached:.3f} of an H100's peak (FlashAttention 2)",
        ALST_OPTIMIZER_FITTED: f"fitted: AdamW on the host's processors takes {optimizer:.1f} s of every step",
    }
    rows = []
    for run in ALST:
        found = made[run.name].figures(reached)
        what, measured = f"{run.name}, {run.tokens:,} tokens", None if run.name in fitted else run.seconds
        rows.append(Row(what, "s", found.seconds + optimizer, measured, fitted.get(run.name, "")))
        rows.append(Row(what, "GiB", found.total / GIB, None, "fitted into 79.6 GiB there, as the longest length"))
    return Part(rows, None, 0.15)


def runs(models: Sequence[str]) -> Part:
    """Whatever models are named: what others published of Llama 3 8B and of GLM-4.5-Air."""
    rows = []
    for run in UPIPE:
        found = prepared(run).figures()
        rows.append(Row(run.name, "s", found.seconds, run.seconds, "as Ulysses, inputs of layers on the host"))
        rows.append(Row(run.name, "GiB", found.total / GIB, run.peak_gib, "without states of an optimizer"))
    made = {run.name: prepared(run) for run in TORCHTITAN}
    reached = reached_by_attention(made[TORCHTITAN_FITTED])
    note = f"fitted: attention reaches {reached:.3f} of an H100's peak, which stands for what its ring does not hide"
    for run in TORCHTITAN:
        plain, found = made[run.name].figures(), made[run.name].figures(reached)
        rows.append(Row(f"{run.name}, nothing fitted", "s", plain.seconds, run.seconds, "their products are in fp8"))
        if run.name != TORCHTITAN_FITTED:
            rows.append(Row(run.name, "s", found.seconds, run.seconds, note))
    for cp, published in RING_AGAINST_ULYSSES.items():
        for name, found, measured in zip(("ring", "Ulysses"), ring_and_ulysses_percent(cp), published, strict=True):
            share, theirs = 100 + found, 100 + measured
            rows.append(Row(f"{name}, cp {cp}, H200", "% of one GPU", share, theirs, "of tokens a second and GPU"))
    return Part(rows, None, None)


PARTS: dict[str, Callable[[Sequence[str]], Part]] = {
    "figure7": figure7,
    "tables": tables,
    "alst": alst,
    "runs": runs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--models", nargs="+", choices=tuple(KORTHIKANTI), default=tuple(KORTHIKANTI))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = {}
    for name in given.part:
        found[name] = PARTS[name](given.models)
        if not given.json:
            Console(width=140).print(_table(name, found[name]))
    if given.json:
        rows = {name: [asdict(row) | {"error": row.error} for row in part.rows] for name, part in found.items()}
        print(json.dumps(rows, indent=1))
    sys.exit(0 if all(part.holds for part in found.values()) else 1)


def _table(name: str, part: Part) -> Table:
    bars = [
        f"{word} {bar:.1%}" for word, bar in (("mean", part.mean_bar), ("worst", part.worst_bar)) if bar is not None
    ]
    title = f"{name}: mean error {part.mean:.2%}, worst {part.worst:.2%}; bars: {', '.join(bars)}"
    table = Table(title=f"{title}: {'kept' if part.holds else 'missed'}", title_justify="left")
    for column in ("what", "unit", "predicted", "published", "error", "note"):
        table.add_column(column, justify="left" if column in ("what", "unit", "note") else "right")
    for row in part.rows:
        measured = "" if row.published is None else f"{row.published:.4g}"
        error = "" if row.error is None else f"{row.error:+.2%}"
        table.add_row(row.what, row.unit, f"{row.predicted:.4g}", measured, error, row.note)
    return table


if __name__ == "__main__":
    main()
