"""`spcompile timeline`: the predicted step of every rank as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spcompile.command.arguments import (
    MOST_TOKENS,
    backend_options,
    parse_attention,
    parse_dtype,
    parse_link,
    parse_mesh,
    parse_options,
    parse_settings,
    parse_tokens,
    require_between,
    require_model,
    require_place_for_file,
)
from spcompile.command.flags import Options, Settings, Sizes
from spcompile.machine.mesh import MOST_RANKS, MeshShape

_WRITTEN = 64  # ranks, where no number is asked for: a trace of more is slow to open


def timeline(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    mesh: Sizes = None,
    seq: str = "4096",
    batch: int = 1,
    dtype: str = "bfloat16",
    attention: str | None = None,
    outputs: str | None = None,
    gpu: str | None = None,
    link: str | None = None,
    ranks: int | None = None,
    settings: Settings = None,
    option: Options = None,
) -> int:
    """Write the predicted step of every rank as a trace that ui.perfetto.dev opens; needs no devices.

    Args:
        model: The model, see above.
        output: The file to write, as trace.json.
        seq: Tokens in a row: 4096, 128k.
        batch: Rows in a batch.
        dtype: Of weights and activations: bfloat16, float32, float16, float64, or short, as bf16.
        attention: The backend's option: auto, ring, ulysses, hybrid, or factors as ulysses=4,ring=2.
        outputs: The backend's option: full, sharded or loss.
        gpu: The backend's option accelerator: h100, h200, b200, a100, cpu, or a file of calibrate, as machine.json.
        link: What all ranks talk over: nvlink or ib. Default: NVLink inside a node of 8 ranks, the network beyond.
        ranks: Only the first so many ranks; all do the same. Default: all, at most 64.
    """
    sizes = parse_mesh(mesh or ["cp=2"])
    tokens, dtype = parse_tokens("--seq", seq), parse_dtype(dtype)
    require_between("--batch", batch, 1, MOST_TOKENS)
    world = MeshShape.of(sizes).world_size
    require_between("--ranks", ranks, 1, min(world, MOST_RANKS))
    require_model(model)
    require_place_for_file("--output", output)
    given = parse_settings(settings or [])
    asked = {"attention": parse_attention(attention), "outputs": outputs, "accelerator": gpu}
    asked["links"] = parse_link(link) if link is not None else None  # type: ignore[assignment]
    options = backend_options(asked | parse_options(option or []), sizes, also=["shard_parameters"])

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    with compile_progress():
        built, inputs = built_with_inputs(model, tokens, batch, dtype, "meta", given)
        plan = spcompile.explain(built, inputs, mesh=sizes, **options)
    written = ranks or min(world, _WRITTEN)
    plan.save_trace(str(output), written)
    seconds = plan.predicted.total("seconds")
    of_all = f"{written} of {world} ranks; all do the same" if written < world else f"{world} ranks"
    print(f"{output}: a step of {1e3 * seconds:.4g} ms, {of_all}. Open it in ui.perfetto.dev.")
    return 0
