"""`spcompile plan`: which mesh and which options for so many ranks."""

from __future__ import annotations

import json as json_text
from typing import TYPE_CHECKING, Any

from spcompile.command.arguments import parse_axes, parse_ranks, parse_tokens
from spcompile.command.flags import Json, Length, OnAnyMesh
from spcompile.diagnostics import IllegalOption, OutOfMemory

if TYPE_CHECKING:
    from torch import nn

    from spcompile.report.plan_table import RankedPlans


def plan(
    model: str,
    /,
    *,
    world: str = "8",
    seq: Length = "4096",
    sweep: str | None = None,
    axes: str = "tp,cp,dp",
    solve: bool = False,
    on: OnAnyMesh = OnAnyMesh(),
    json: Json = False,
) -> int:
    """Find the mesh and the options with which MODEL trains fastest on so many ranks; needs no devices.

    Args:
        model: The model, see above.
        world: Ranks in all; with --solve also several numbers, as 8,16,64.
        sweep: Several lengths, as 32k,128k,1M, instead of --seq: the best of each, one row a length.
        axes: Axes that meshes may have.
        solve: Print costs as expressions of the length S, from --seq on to 16 times that, and the lengths at which
            strategies stop to fit or become faster than others.
    """
    lengths = [parse_tokens("--sweep", text) for text in sweep.split(",")] if sweep is not None else []
    tokens = parse_tokens("--seq", seq)
    worlds = [parse_ranks("--world", text) for text in world.split(",")]
    if len(worlds) > 1 and not solve:
        raise IllegalOption(f"--world {world} without --solve", legal="one number of ranks")
    if solve and (sweep is not None or axes != "tp,cp,dp"):
        raise IllegalOption("--solve with --sweep or --axes", legal="--seq, the shortest of its lengths, and --world")
    asked = on.asked(model)
    wanted = parse_axes(axes)

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    def plans_of(length: int) -> RankedPlans:
        built, inputs = built_with_inputs(model, length, asked.batch, asked.dtype, "meta", asked.settings)
        return spcompile.plan(built, inputs, worlds[0], axes=wanted, workers=on.workers, **asked.options)

    if solve:
        from spcompile.solve_lengths import solve as solved

        def build(length: int, entries: int) -> tuple[nn.Module, Any]:
            return built_with_inputs(model, length, entries, asked.dtype, "meta", asked.settings)

        with compile_progress():
            lines = solved(build, worlds, tokens, asked.batch, workers=on.workers, **asked.options)
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
