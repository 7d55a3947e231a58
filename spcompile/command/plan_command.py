"""`spcompile plan`: which mesh and which options for so many ranks."""

from __future__ import annotations

import json as json_text
from typing import TYPE_CHECKING, Any

from spcompile.command.arguments import (
    MOST_TOKENS,
    parse_axes,
    parse_dtype,
    parse_link,
    parse_options,
    parse_ranks,
    parse_settings,
    parse_tokens,
    require_between,
    require_model,
)
from spcompile.command.flags import Json, Options, Settings
from spcompile.diagnostics import IllegalOption, OutOfMemory
from spcompile.options import Options as BackendOptions

if TYPE_CHECKING:
    from torch import nn

    from spcompile.report.plan_table import RankedPlans


def plan(
    model: str,
    /,
    *,
    world: str = "8",
    seq: str = "4096",
    sweep: str | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    gpu: str | None = None,
    link: str | None = None,
    memory: str | None = None,
    axes: str = "tp,cp,dp",
    optimizer: str | None = None,
    workers: int | None = None,
    solve: bool = False,
    settings: Settings = None,
    option: Options = None,
    json: Json = False,
) -> int:
    """Find the mesh and the options with which MODEL trains fastest on so many ranks; needs no devices.

    Args:
        model: The model, see above.
        world: Ranks in all; with --solve also several numbers, as 8,16,64.
        seq: Tokens in a row: 4096, 128k.
        sweep: Several lengths, as 32k,128k,1M, instead of --seq: the best of each, one row a length.
        batch: Rows in the whole batch, which dp splits.
        dtype: Of weights and activations: bfloat16, float32, float16, float64, or short, as bf16.
        gpu: The backend's option accelerator: h100, h200, b200, a100, cpu, or a file of calibrate, as machine.json.
        link: What all ranks talk over: nvlink or ib. Default: NVLink inside a node of 8 ranks, the network beyond.
        memory: What a step may take on one rank, as 80GiB. Default: what the accelerator has, less a tenth.
        axes: Axes that meshes may have.
        optimizer: The backend's option: adamw, adamw-float32, adamw-master, momentum, none.
        workers: Processes that compile; default: one for each core.
        solve: Print costs as expressions of the length S, from --seq on to 16 times that, and the lengths at which
            strategies stop to fit or become faster than others.
    """
    lengths = [parse_tokens("--sweep", text) for text in sweep.split(",")] if sweep is not None else []
    tokens, dtype = parse_tokens("--seq", seq), parse_dtype(dtype)
    worlds = [parse_ranks("--world", text) for text in world.split(",")]
    if len(worlds) > 1 and not solve:
        raise IllegalOption(f"--world {world} without --solve", legal="one number of ranks")
    if solve and (sweep is not None or axes != "tp,cp,dp"):
        raise IllegalOption("--solve with --sweep or --axes", legal="--seq, the shortest of its lengths, and --world")
    require_between("--batch", batch, 1, MOST_TOKENS)
    require_between("--workers", workers, 1, 1 << 10)
    require_model(model)
    given = parse_settings(settings or [])
    asked = {"accelerator": gpu, "memory": memory, "optimizer": optimizer}
    asked["links"] = parse_link(link) if link is not None else None  # type: ignore[assignment]
    options = {name: value for name, value in asked.items() if value is not None} | parse_options(option or [])
    BackendOptions.parse({name: value for name, value in options.items() if name != "attention"})
    wanted = parse_axes(axes)

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    def plans_of(length: int) -> RankedPlans:
        built, inputs = built_with_inputs(model, length, batch, dtype, "meta", given)
        return spcompile.plan(built, inputs, worlds[0], axes=wanted, workers=workers, **options)

    if solve:
        from spcompile.solve_lengths import solve as solved

        def build(length: int, entries: int) -> tuple[nn.Module, Any]:
            return built_with_inputs(model, length, entries, dtype, "meta", given)

        with compile_progress():
            lines = solved(build, worlds, tokens, batch, workers=workers, **options)
        print(json_text.dumps(lines.to_dict()) if json else str(lines))
        return 0
    if not lengths:
        with compile_progress():
            found = plans_of(tokens)
        print(json_text.dumps(found.to_dict()) if json else str(found))
        return 0
    from spcompile.report.sweep_table import sweep_dict, sweep_text

    rows: dict[int, RankedPlans | OutOfMemory] = {}
    with compile_progress():
        for length in lengths:
            try:
                rows[length] = plans_of(length)
            except OutOfMemory as error:
                rows[length] = error
    print(json_text.dumps(sweep_dict(rows)) if json else sweep_text(rows))
    return 0
