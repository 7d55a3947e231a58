"""`spcompile compare`: the ways to use so many ranks, side by side, at several lengths."""

from __future__ import annotations

import json as json_text
from typing import Any

from spcompile.command.arguments import (
    MOST_TOKENS,
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


def compare(
    model: str,
    /,
    *,
    world: int = 8,
    seq: str = "32k,128k,1M",
    batch: int = 1,
    dtype: str = "bfloat16",
    gpu: str | None = None,
    link: str | None = None,
    memory: str | None = None,
    optimizer: str | None = None,
    workers: int | None = None,
    settings: Settings = None,
    option: Options = None,
    json: Json = False,
) -> int:
    """Show memory, bytes sent and time of tp, of rings, of Ulysses and of hybrids of both; needs no devices.

    Args:
        model: The model, see above.
        world: Ranks in all.
        seq: Tokens in a row, several lengths: 32k,128k,1M.
        batch: Rows in the whole batch.
        dtype: Of weights and activations: bfloat16, float32, float16, float64, or short, as bf16.
        gpu: The backend's option accelerator: h100, h200, b200, a100, cpu, or a file of calibrate, as machine.json.
        link: What all ranks talk over: nvlink or ib. Default: NVLink inside a node of 8 ranks, the network beyond.
        memory: What a step may take on one rank, as 80GiB. Default: what the accelerator has, less a tenth.
        optimizer: The backend's option: adamw, adamw-float32, adamw-master, momentum, none.
        workers: Processes that compile; default: one for each core.
    """
    lengths = list(dict.fromkeys(parse_tokens("--seq", text) for text in seq.split(",")))
    dtype = parse_dtype(dtype)
    require_between("--world", world, 2, MOST_RANKS)
    require_between("--batch", batch, 1, MOST_TOKENS)
    require_between("--workers", workers, 1, 1 << 10)
    require_model(model)
    given = parse_settings(settings or [])
    asked: dict[str, Any] = {"accelerator": gpu, "memory": memory, "optimizer": optimizer}
    asked["links"] = parse_link(link) if link is not None else None
    options = {name: value for name, value in asked.items() if value is not None} | parse_options(option or [])
    BackendOptions.parse(options)

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    found = None
    with compile_progress():
        for length in lengths:
            built, inputs = built_with_inputs(model, length, batch, dtype, "meta", given)
            one = spcompile.compare(built, inputs, world, workers=workers, **options)
            found = one if found is None else found + one
    assert found is not None
    print(json_text.dumps(found.to_dict()) if json else str(found), end="" if not json else "\n")
    return 0
