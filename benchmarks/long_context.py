"""Llama 3 8B on eight H100s, by plan: what fits, what is made again for it, what that costs; beside published runs.

    python benchmarks/long_context.py [--tokens 32768 1048576] [--ranks 8] [--memory auto]
                                      [--host-memory auto] [--json]

Nothing runs: spcompile.explain compiles on `meta` weights, bfloat16, batch 1, parameters sharded over cp (ZeRO-3),
AdamW in float32. Bytes are those of the plan; seconds are predictions of its tables, without the optimizer's step. MFU
in two counts: causal counts the half of the scores that a causal mask leaves, full counts all of them.

Published, as measured by their authors on 8 H100: torchtitan's Llama 3 8B context parallel (tokens a second and GPU),
Untied Ulysses (arXiv 2602.21196), ALST (arXiv 2506.13996, Llama 3.1 8B, "+ Ulysses", attention counted in full).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

import spcompile
from spcompile.command.model_spec import build_model
from spcompile.machine.accelerators import ACCELERATORS
from spcompile.machine.byte_sizes import bytes_text

MODEL, ACCELERATOR = "models:llama3-8b", "h100"
PUBLISHED = {
    131_072: "torchtitan 1071 tokens/s/GPU; Untied Ulysses 2280 tokens/s/GPU, peak 21.1 GiB",
    4_194_304: "ALST 6455 s at 3.7 M tokens, states of the optimizer on the CPU, inputs of blocks too",
    1_048_576: "ALST 564 s at 1.1 M tokens, states of the optimizer on the CPU",
}


def row_of(tokens: int, ranks: int, memory: str, host_memory: str) -> dict[str, Any]:
    built = build_model(MODEL, seq=tokens, device="meta", dtype="bfloat16", settings={})
    inputs = built.example_inputs(1, tokens, "meta")
    options = {"outputs": "loss", "memory": memory, "host_memory": host_memory}
    options |= {"optimizer": "adamw-float32", "accelerator": ACCELERATOR}
    plan = spcompile.explain(built.model, inputs, {"cp": ranks}, shard_parameters="cp", **options)
    found = plan.to_dict()["memory"]
    seconds = plan.predicted.total("seconds")
    again = sum(row["seconds"] for row in found["actions"])
    products, scores = flops(built.model, tokens)
    peak = ranks * ACCELERATORS[ACCELERATOR].peak(2) * seconds
    return {
        "tokens": tokens,
        "fits": found["fits"],
        "total_bytes": found["total_bytes"],
        "saved_bytes": found["saved_activation_bytes"],
        "transient_bytes": found["transient_bytes"],
        "host_bytes": found["host_bytes"],
        "host_node_bytes": found["host_node_bytes"],
        "seconds": seconds,
        "seconds_again": again,
        "tokens_per_second_per_gpu": tokens / seconds / ranks,
        "mfu_causal": (products + scores / 2) / peak,
        "mfu_full": (products + scores) / peak,
    }


def flops(model: Any, tokens: int) -> tuple[float, float]:
    """(of products with weights, of all scores) in a step: forward and backward, nothing made again."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - config.vocab * config.dim  # an embedding multiplies nothing
    return 6.0 * weights * tokens, 12.0 * config.layers * config.dim * tokens**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072, 1_048_576, 4_194_304])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--host-memory", default="auto", help="of a node of eight ranks; 0B: nothing waits there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = [row_of(tokens, given.ranks, given.memory, given.host_memory) for tokens in given.tokens]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(
        title=f"Llama 3 8B, bfloat16, ZeRO-3 on cp = {given.ranks}, {ACCELERATORS[ACCELERATOR].name}: planned"
    )
    for name in (
        "tokens",
        "fits",
        "peak",
        "saved",
        "transient",
        "host",
        "on the node",
        "s",
        "s again",
        "MFU causal",
        "MFU full",
        "published",
    ):
        table.add_column(name, justify="left" if name == "published" else "right")
    for r in rows:
        names = ("total_bytes", "saved_bytes", "transient_bytes", "host_bytes", "host_node_bytes")
        sizes = (bytes_text(r[name]) for name in names)
        times = (f"{r['seconds']:.4g}", f"{r['seconds_again']:.3g}")
        shares = (f"{r['mfu_causal']:.0%}", f"{r['mfu_full']:.0%}")
        fits = "yes" if r["fits"] else "no"
        table.add_row(f"{r['tokens']:,}", fits, *sizes, *times, *shares, PUBLISHED.get(r["tokens"], ""))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
