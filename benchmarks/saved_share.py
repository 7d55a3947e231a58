"""Saved activation bytes per rank against one device, counted from the final graphs; cp = 2, 4, 8.

    python benchmarks/saved_share.py [MODEL] [--seq 8192] [--json]

Nothing runs: spcompile.explain compiles for every mesh on `meta` weights. The bar is 1.05 x (one device / cp), logits
aside, which outputs="loss" leaves inside the loss.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

import spcompile
from spcompile.command.model_spec import build_model

MIB = 2**20


def rows_of(spec: str, seq: int) -> list[dict[str, Any]]:
    rows = []
    for attention in ("ring", "ulysses", "hybrid"):
        for degree in (2, 4, 8) if attention != "hybrid" else (4, 8):
            built = build_model(spec, seq=seq, device="meta", dtype="bfloat16", settings={})
            inputs = built.example_inputs(1, seq, "meta")
            plan = spcompile.explain(built.model, inputs, mesh={"cp": degree}, attention=attention, outputs="loss")
            memory = plan.to_dict()["memory"]
            kept, alone = memory["saved_activation_bytes"], memory["saved_activation_bytes_one_device"]
            ratio = kept / (alone / degree)
            rows.append({"attention": attention, "cp": degree, "saved": kept, "one_device": alone, "ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models:llama")
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = rows_of(given.model, given.seq)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"{given.model}, {given.seq} tokens, bfloat16: saved for backward")
    for name in ("asked for", "cp", "MiB a rank", "MiB on one device", "x of one device / cp"):
        table.add_column(name, justify="right")
    for r in rows:
        sizes = (f"{r['saved'] / MIB:.1f}", f"{r['one_device'] / MIB:.1f}", f"{r['ratio']:.3f}")
        table.add_row(r["attention"], str(r["cp"]), *sizes)
    Console().print(table)


if __name__ == "__main__":
    main()
