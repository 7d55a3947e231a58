"""`spcompile plan`: which mesh and which options for so many ranks."""

from __future__ import annotations

import json as json_text

from spcompile.command.arguments import (
    MOST_TOKENS,
    parse_axes,
    parse_dtype,
    parse_link,
    parse_options,
    parse_settings,
    parse_tokens,
    require_between,
    require_model,
)
from spcompile.command.flags import Json, Options, Settings
from spcompile.machine.mesh import MOST_RANKS
from spcompile.options import Options as BackendOptions


def plan(
    model: str,
    /,
    *,
    world: int = 8,
    seq: str = "4096",
    batch: int = 1,
    dtype: str = "bfloat16",
    gpu: str | None = None,
    link: str | None = None,
    memory: str | None = None,
    axes: str = "tp,cp,dp",
    optimizer: str | None = None,
    workers: int | None = None,
    settings: Settings = None,
    option: Options = None,
    json: Json = False,
) -> int:
    """Find the mesh and the options with which MODEL trains fastest on so many ranks; needs no devices.

    Args:
        model: The model, see above.
        world: Ranks in all.
        seq: Tokens in a row: 4096, 128k.
        batch: Rows in the whole batch, which dp splits.
        dtype: Of weights and activations: bfloat16, float32, float16, float64, or short, as bf16.
        gpu: The backend's option accelerator: h100, h200, b200, a100, cpu.
        link: What all ranks talk over: nvlink or ib. Default: NVLink inside a node of 8 ranks, the network beyond.
        memory: What a step may take on one rank, as 80GiB. Default: what the accelerator has, less a tenth.
        axes: Axes that meshes may have.
        optimizer: The backend's option: adamw, adamw-float32, adamw-master, momentum, none.
        workers: Processes that compile; default: one for each core.
    """
    tokens, dtype = parse_tokens("--seq", seq), parse_dtype(dtype)
    require_between("--world", world, 1, MOST_RANKS)
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

    with compile_progress():
        built, inputs = built_with_inputs(model, tokens, batch, dtype, "meta", given)
        found = spcompile.plan(built, inputs, world, axes=wanted, workers=workers, **options)
    print(json_text.dumps(found.to_dict()) if json else str(found))
    return 0
