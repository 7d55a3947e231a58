"""Our attention kernels beside FlexAttention's, by what they compile to: no GPU is needed, and none is measured.

    python benchmarks/kernels_static.py [--arch 90 100] [--sizes 64 128] [--json FILE]

Both are compiled by the same triton, causal, bfloat16, 8 heads of each size, with the tiles that each would take. A row
is a loop over tiles that see all of their keys. Instructions are those of a thread, divided by its share of the scores
of a tile; exp is 1 at best. A bound says how many TFLOP/s would be reached if all parts of a multiprocessor worked at
once and only the busiest held up the others: tensor cores, exponentials, float32, or four instructions a cycle.
FLOPs are counted as usual, 2 products forward and 5 backward, of which both make 7. Lower bounds on time are no
times: what a kernel waits for is not in them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"
import flex_kernels
import from_tree  # noqa: F401  (where spcompile is not installed)
from machine_code import CARDS, MachineCode, TileLoop, read

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
import torch
from rich.console import Console
from rich.table import Table
from triton_resources import compiled

from spcompile.attention.kernels.triton.configs import TABLE
from spcompile.attention.kernels.triton.launch import ForwardTensors, Hop, RowTensors
from spcompile.attention.scores.mask import AttentionMask
from spcompile.attention.scores.provider import Scores
from spcompile.attention.scores.runs import natural_runs

B, N, S = 2, 8, 4096
PRODUCTS = {"forward": 2, "dq": 3, "dk, dv": 4}
USEFUL = {"forward": 2, "backward": 5}
COUNTED = ("matrix", "exp", "float", "integer and moves", "shared", "global", "barrier")


class Row(NamedTuple):
    """One loop of one kernel. tile: queries, keys."""

    arch: int
    size: int
    part: str
    whose: str
    tile: tuple[int, int]
    code: MachineCode
    loop: TileLoop

    @property
    def cycles_of_a_score(self) -> dict[str, float]:
        """The least cycles of a multiprocessor, by what would be busy."""
        scores = self.tile[0] * self.tile[1]
        operations = 2.0 * PRODUCTS[self.part] * scores * self.size
        found = self.loop.cycles(CARDS[self.arch], self.code.warps, operations)
        return {name: cycles / scores for name, cycles in found.items()}

    def of_a_score(self, kind: str) -> float:
        """Instructions of a kind; of matrix instructions those of a whole tile of 128 x 128 instead."""
        threads, scores = 32 * self.code.warps, self.tile[0] * self.tile[1]
        if kind == "matrix":
            return self.loop.counts[kind] * self.code.warps / scores * 128 * 128
        return self.loop.counts[kind] * threads / scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(CARDS), choices=sorted(CARDS))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], choices=[64, 128])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [row for arch in given.arch for size in given.sizes for row in (*ours(size, arch), *flex(size, arch))]
    console = Console(width=170)
    console.print(table_of_loops(rows))
    found = bounds(rows)
    console.print(table_of_bounds(found))
    if given.json:
        given.json.write_text(json.dumps({"loops": [as_json(row) for row in rows], "bounds": found}, indent=1))


def ours(size: int, arch: int) -> list[Row]:
    """Forward, dq, and dk with dv, of one device or a ring of one hop."""
    configs = TABLE[f"sm{arch}", 2, size, "plain"]
    q, k, v, grad_out = (torch.empty(B, N, S, size, dtype=torch.bfloat16) for _ in range(4))
    row, wide = torch.empty(B, N, S), torch.empty(B, N, S, size)
    scores = Scores(AttentionMask.parse("causal"), size**-0.5)
    hop = Hop(q, k, v, natural_runs(S), natural_runs(S), scores, configs)
    gradients = RowTensors(grad_out, row, row)
    launches = {
        "forward": (hop.forward(ForwardTensors(grad_out, row, wide, row, row), True, True), configs.forward),
        "dq": (hop.row_gradients(gradients, wide, q, True, True), configs.rows),
        "dk, dv": (hop.key_gradients(gradients, k, v), configs.keys),
    }
    return [
        Row(arch, size, part, "ours", (config.block_m, config.block_n), code, fullest(code.loops))
        for part, (launch, config) in launches.items()
        for code in [read(compiled(launch, arch))]
    ]


def flex(size: int, arch: int) -> list[Row]:
    """The same of FlexAttention, whose backward is one kernel with the loops of both: first dq's."""
    kernel, tile = flex_kernels.forward(size, arch)
    code = read(kernel)
    rows = [Row(arch, size, "forward", "flex", tile, code, fullest(code.loops))]
    kernel, (block_m, block_n) = flex_kernels.backward(size, arch)
    code = read(kernel)
    half = len(code.loops) // 2
    return [
        *rows,
        Row(arch, size, "dq", "flex", (block_n, block_m), code, fullest(code.loops[:half])),
        Row(arch, size, "dk, dv", "flex", (block_m, block_n), code, fullest(code.loops[half:])),
    ]


def fullest(loops: list[TileLoop]) -> TileLoop:
    """Of the loops over tiles with and without a mask, the one without."""
    return min(loops, key=lambda loop: loop.instructions)


def bounds(rows: list[Row]) -> list[dict[str, Any]]:
    """TFLOP/s forward and backward of whole attention, by the busiest part of the multiprocessor."""
    found: list[dict[str, Any]] = []
    for arch, size in dict.fromkeys((row.arch, row.size) for row in rows):
        card = CARDS[arch]
        for direction, parts in {"forward": ("forward",), "backward": ("dq", "dk, dv")}.items():
            one: dict[str, Any] = {"arch": arch, "size": size, "direction": direction}
            for whose in ("ours", "flex"):
                of = [r for r in rows if (r.arch, r.size, r.whose) == (arch, size, whose) and r.part in parts]
                cycles = sum(max(row.cycles_of_a_score.values()) for row in of)
                one[whose] = 2 * USEFUL[direction] * size / cycles * card.processors * card.hertz / 1e12
                one[f"{whose}_busiest"] = [max(r.cycles_of_a_score.items(), key=lambda x: x[1])[0] for r in of]
            found.append(one)
    return found


def table_of_loops(rows: list[Row]) -> Table:
    """What a thread does for a score."""
    table = Table(title="A loop over whole tiles: instructions for a score (matrix: for 128 x 128 scores)")
    for name in ("arch", "head", "part", "whose", "tile", "warps", *COUNTED, "all", "registers", "spilled", "shared"):
        table.add_column(name, justify="right")
    table.add_column("programs", justify="right")
    for row in rows:
        code, every = row.code, row.loop.instructions * 32 * row.code.warps / (row.tile[0] * row.tile[1])
        table.add_row(
            f"sm_{row.arch}", str(row.size), row.part, row.whose, "x".join(map(str, row.tile)), str(code.warps),
            *(f"{row.of_a_score(kind):.2f}" for kind in COUNTED), f"{every:.2f}",
            str(code.registers), str(code.spilled), str(code.shared), str(code.programs),
        )  # fmt: skip
    return table


def table_of_bounds(found: list[dict[str, Any]]) -> Table:
    """One line for each direction."""
    table = Table(title="Bounds: TFLOP/s if only the busiest part held up the others")
    for name in ("arch", "head", "direction", "ours", "busiest", "flex", "busiest", "ours / flex"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            f"sm_{one['arch']}", str(one["size"]), one["direction"],
            f"{one['ours']:.0f}", ", ".join(one["ours_busiest"]),
            f"{one['flex']:.0f}", ", ".join(one["flex_busiest"]), f"{one['ours'] / one['flex']:.2f}",
        )  # fmt: skip
    return table


def as_json(row: Row) -> dict[str, Any]:
    """All that is known of a row."""
    code = row.code
    return {
        **{name: getattr(row, name) for name in ("arch", "size", "part", "whose", "tile")},
        **{name: getattr(code, name) for name in ("registers", "spilled", "shared", "warps", "programs")},
        "counts": dict(row.loop.counts),
        "cycles_of_a_score": row.cycles_of_a_score,
    }


if __name__ == "__main__":
    main()
