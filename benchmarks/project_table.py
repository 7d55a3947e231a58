"""The table that this project exists for, ours beside theirs: which shape, batch and recompute come out nearest.

    python benchmarks/project_table.py [--shapes llama3-8b ...] [--json FILE]

Theirs names no model. For each published shape every row is compiled at every level of recompute: what eager autograd
keeps, what the compiler keeps, then the kinds of values that it makes again, the cheapest first, until a layer keeps
little but its input. Bytes and seconds of a batch are those of one entry times its size. Of the levels and batches the
one is stated that is nearest, by the ratios of bytes and of MFU, each in logarithms. MFU stands in both counts, of
attention as its mask leaves it (causal) and without the mask (full).

Speeds are those of spcompile/machine/hardware.json for H100s in nodes of eight. Nothing runs, and nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import from_tree  # noqa: F401  (where spcompile is not installed)
import torch
from held_scores import as_eager_autograd
from published import SHAPES, TABLE_ROWS
from rich.console import Console
from rich.table import Table

from spcompile import models
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.memory.ladder import Ladder
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.plan_world import with_depths
from spcompile.planning.candidates import Candidate
from spcompile.planning.ranking import Ranked, ranked
from spcompile.planning.search import Depths, Result, at_rung, steps_of
from spcompile.planning.short_step import ShortStep

GPU = "h100"
BATCHES = (1, 2, 4, 8)
GB = 1e9
EAGER = -2  # instead of a rung of the ladder
H100 = ACCELERATORS[GPU]
CANDIDATES = {
    "tp 8": Candidate((("tp", 8),), megatron_sp=False),
    "tp 8, Megatron SP": Candidate((("tp", 8),)),
    "tp 8, ring 8": Candidate((("cp", 8), ("tp", 8)), "ring", True, ("cp",)),
    "ring 8": Candidate((("cp", 8),), "ring", True, ("cp",)),
}


@dataclass(frozen=True)
class Level:
    """A row of theirs as it comes out for one shape, way and level of recompute, with a batch of one.

    rung: of the ladder of `spcompile.memory.ladder`; EAGER: what eager autograd keeps. is_exact: whether it was
    compiled so; else seconds are those without recompute and those of what is made again.
    """

    row: str
    shape: str
    way: str
    rung: int
    again: tuple[str, ...]
    activation_bytes: float
    total_bytes: float
    mfu_causal: float
    mfu_full: float
    communication_share: float
    exposed_share: float
    seconds: float
    is_exact: bool = True


@dataclass(frozen=True)
class Found:
    """A level with a batch, and how far it is from what they say, in one of the counts of MFU."""

    level: Level
    batch: int
    count: str

    @property
    def mfu(self) -> float:
        """In its count."""
        return self.level.mfu_full if self.count == "full" else self.level.mfu_causal

    @property
    def gb(self) -> float:
        """Of activations."""
        return self.batch * self.level.activation_bytes / GB

    @property
    def distance(self) -> float:
        """0 where both figures are theirs."""
        row = TABLE_ROWS[self.level.row]
        return math.hypot(math.log(self.gb / row.activation_gb), math.log(self.mfu / row.mfu))


def levels_of(shape: str, row: str, only: tuple[str, int] | None = None) -> list[Level]:
    """Every level of recompute of a row. only: (way, rung), which is then compiled."""
    options = Options.parse({"outputs": "loss", "accelerator": GPU, "optimizer": "adamw", "memory": "speed"})
    tokens, found = TABLE_ROWS[row].tokens, []

    def explore(depths: Depths, _: int) -> None:
        for way in TABLE_ROWS[row].ways if only is None else only[:1]:
            steps = steps_of(depths, CANDIDATES[way], options, PIPELINE)
            wanted = [EAGER, 0] if only is None else [only[1]]
            for rung in wanted:
                one = _compiled(depths, CANDIDATES[way], steps, rung)
                found.append(_level(row, shape, way, rung, ranked([one], one.candidate.ranks, tokens, H100, 2)[0]))
            if only is None:
                found.extend(_estimated(found[-1], depths, steps))

    with torch.device("meta"):
        sizes = {name: value for name, value in vars(SHAPES[shape]).items() if name != "source"}
        model = models.build("llama", **sizes).to(torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
    with_depths(model, {"ids_BS": ids, "labels_BS": ids}, 1, options, explore)
    return found


def _compiled(depths: Depths, candidate: Candidate, steps: Sequence[ShortStep], rung: int) -> Result:
    if rung != EAGER:
        return at_rung(depths, candidate, steps, rung)
    eager = [replace(step, base=step.traced.cut(as_eager_autograd), ladder=None) for step in steps]
    return at_rung(depths, candidate, eager, 0)


def _estimated(plain: Level, depths: Depths, steps: Sequence[ShortStep]) -> Iterator[Level]:
    """The further rungs: bytes are exact, seconds those of `plain` and of what is made again."""
    ladders = [step.ladder for step in steps]
    blocks = [short.blocks for short in depths.shorts]
    more = (depths.count - blocks[0]) / (blocks[1] - blocks[0])
    for rung in range(1, min(len(ladder.kinds) for ladder in ladders if ladder is not None) + 1):
        saved, again = (_continued([read(x, rung) for x in ladders], more) for read in (_saved, _again))
        slower = plain.seconds / (plain.seconds + again)
        kinds = ladders[0].kinds[:rung] if ladders[0] is not None else ()
        names = tuple(f"{op.partition('.')[0]} of line {at.line if at else 0}" for op, at in kinds)
        yield replace(
            plain,
            rung=rung,
            again=names,
            activation_bytes=saved,
            total_bytes=plain.total_bytes - plain.activation_bytes + saved,
            mfu_causal=plain.mfu_causal * slower,
            mfu_full=plain.mfu_full * slower,
            communication_share=plain.communication_share * slower,
            exposed_share=plain.exposed_share * slower,
            seconds=plain.seconds + again,
            is_exact=False,
        )


def _continued(pair: Sequence[float], more: float) -> float:
    return pair[0] + (pair[1] - pair[0]) * more


def _saved(ladder: Ladder, rung: int) -> float:
    joint = ladder.joint
    roots = {joint.storage[node] for node in ladder.rung(rung).saved}
    return sum(joint.bytes_of[root] for root in roots if root in joint.is_forward)


def _again(ladder: Ladder, rung: int) -> float:
    return sum(trade.seconds for trade in ladder.made(rung))


def _level(row: str, shape: str, way: str, rung: int, one: Ranked) -> Level:
    return Level(
        row,
        shape,
        way,
        rung,
        one.result.again or ("nothing, as eager autograd" if rung == EAGER else "elementwise calls, as compiled",),
        one.figures.saved,
        one.figures.total,
        one.mfu_causal,
        one.mfu_full,
        one.communication_share,
        one.exposed_share,
        one.seconds,
    )


def exact(found: Found) -> Found:
    """The same, compiled."""
    level = found.level
    if level.is_exact:
        return found
    (compiled,) = levels_of(level.shape, level.row, (level.way, level.rung))
    return replace(found, level=compiled)


def nearest(levels: Sequence[Level], count: str) -> Found:
    """Of all levels and batches."""
    return min((Found(level, batch, count) for level in levels for batch in BATCHES), key=lambda one: one.distance)


def nearest_shape(levels: Sequence[Level]) -> list[Found]:
    """One shape and one count for all rows: those whose rows are nearest together."""
    choices = []
    for shape in dict.fromkeys(level.shape for level in levels):
        for count in ("full", "causal"):
            own = [[x for x in levels if (x.shape, x.row) == (shape, row)] for row in TABLE_ROWS]
            choices.append([nearest(rows, count) for rows in own])
    return min(choices, key=lambda found: sum(one.distance**2 for one in found))


def claims(levels: Sequence[Level], rows: Sequence[Found]) -> list[str]:
    """What is said beside the table, and what comes out; rows: one for each row of the table."""
    lines = []
    for one in rows:
        level = one.level
        verdict = "holds" if level.communication_share < 0.15 else "does not hold"
        lines.append(
            f"communication under 15%, {level.row}: {verdict}: {level.communication_share:.0%} of the step is on the "
            f"way, {level.exposed_share:.0%} is waited for"
        )
    shape, limit = rows[0].level.shape, H100.usable_memory
    plain = [x for x in levels if (x.shape, x.row) == (shape, "no sequence parallelism") and x.rung != EAGER]
    assert limit is not None
    for level in (plain[0], min(plain, key=lambda x: x.activation_bytes)):
        at_64k = level.total_bytes + level.activation_bytes  # activations of twice the length
        verdict = "does not fit" if at_64k > limit else "fits"
        made = "nothing but elementwise calls" if level is plain[0] else "all that can be"
        lines.append(
            f"from 64k on it must be on, {shape}, {made} made again: 64k without it takes {at_64k / GB:.0f} GB and "
            f"{verdict} into {limit / GB:.0f}"
        )
    for one in rows:
        counts = f"{one.level.mfu_causal:.0%} causal, {one.level.mfu_full:.0%} full"
        lines.append(f"MFU, {one.level.row}: they say {TABLE_ROWS[one.level.row].mfu:.0%}; here {counts}")
    lines.append(
        "58% at 128k: the best published run (Untied Ulysses) has 34.9% causal and 58.6% full, by its tokens/s"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    levels: list[Level] = []
    for shape in given.shapes:
        for row in TABLE_ROWS:
            print(f"{shape}, {row}", file=sys.stderr, flush=True)
            levels += levels_of(shape, row)
    console = Console(width=180)
    together = [exact(one) for one in nearest_shape(levels)]
    each = [nearest([x for x in levels if x.row == row], count) for row in TABLE_ROWS for count in ("full", "causal")]
    console.print(_table("Each row nearest on its own, in either count of MFU; times of recompute are estimates", each))
    console.print(_table("One shape and one count for all rows, compiled so", together))
    print(*claims(levels, together), sep="\n")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump([asdict(level) for level in levels], file, indent=1)


def _table(title: str, found: Sequence[Found]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("row", "shape", "way", "batch", "made again"):
        table.add_column(name)
    for name in ("GB", "theirs", "MFU causal", "full", "theirs", "comm", "exposed", "all GB"):
        table.add_column(name, justify="right")
    for one in found:
        level, row = one.level, TABLE_ROWS[one.level.row]
        shares = [f"{x:.0%}" for x in (level.communication_share, level.exposed_share)]
        mfu = [f"{level.mfu_causal:.0%}", f"{level.mfu_full:.0%}"]
        mfu = [text + "*" * (name == one.count) for name, text in zip(("causal", "full"), mfu, strict=True)]
        table.add_row(
            level.row,
            level.shape,
            level.way,
            str(one.batch),
            level.again[-1] if len(level.again) < 3 else f"{len(level.again)} kinds, to {level.again[-1]}",
            f"{one.gb:.1f}",
            f"{row.activation_gb:g}",
            *mfu,
            f"{row.mfu:.0%}",
            *shares,
            f"{level.total_bytes / GB:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
