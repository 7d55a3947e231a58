"""The best way to run a model at several lengths, one row a length."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from spcompile.diagnostics import OutOfMemory
from spcompile.machine.byte_sizes import bytes_text
from spcompile.plain_text import one_line
from spcompile.planning.ranking import candidate_name
from spcompile.report.plan_table import PLANS_SCHEMA_VERSION, RankedPlans

Sweep = Mapping[int, RankedPlans | OutOfMemory]  # tokens of a row -> plans, or why none fits
_SWEEP_WIDTH = 140


def sweep_text(found: Sweep) -> str:
    """A table for people."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens", justify="right")
    table.add_column("best")
    for name in ("ZeRO-3", "activations", "total", "exposed", "seconds", "tokens/s", "MFU", "full"):
        table.add_column(name, justify="right")
    for tokens, plans in found.items():
        table.add_row(f"{tokens:,}", *_best_cells(plans))
    out = io.StringIO()
    console = Console(file=out, width=_SWEEP_WIDTH, highlight=False, color_system=None, markup=False, emoji=False)
    console.print(table)
    for tokens, plans in found.items():
        if isinstance(plans, OutOfMemory):
            console.print(f"{tokens:,} tokens: {one_line(plans.found)}; {one_line(plans.legal or '')}", soft_wrap=True)
    return out.getvalue()


def _best_cells(plans: RankedPlans | OutOfMemory) -> list[str]:
    if isinstance(plans, OutOfMemory):
        return ["does not fit"]
    row = plans.rows[plans.choice]
    return [
        candidate_name(row),
        ",".join(row.result.candidate.shard),
        bytes_text(row.figures.saved),
        bytes_text(row.figures.total),
        f"{row.exposed_share:.1%}",
        f"{row.seconds:.4g}",
        f"{row.tokens_per_second_per_gpu:,.0f}",
        f"{row.mfu_causal:.0%}",
        f"{row.mfu_full:.0%}",
    ]


def sweep_dict(found: Sweep) -> dict[str, Any]:
    """JSON-able: of each length the plans, or why none fits."""
    rows = [
        {"tokens": tokens, "error": str(plans)} if isinstance(plans, OutOfMemory) else plans.to_dict()
        for tokens, plans in found.items()
    ]
    return {"schema_version": PLANS_SCHEMA_VERSION, "lengths": rows}
