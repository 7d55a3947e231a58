"""`spcompile timeline`: the predicted step of every rank as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from spcompile.command.arguments import require_between, require_place_for_file
from spcompile.command.flags import OnMachine, OnMesh
from spcompile.machine.mesh import MOST_RANKS, MeshShape

_WRITTEN = 64  # ranks, where no number is asked for: a trace of more is slow to open


def timeline(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    step: OnMesh = OnMesh(),
    machine: OnMachine = OnMachine(),
    ranks: int | None = None,
) -> int:
    """Write the predicted step of every rank as a trace that ui.perfetto.dev opens; needs no devices.

    Args:
        model: The model, see above.
        output: The file to write, as trace.json.
        ranks: Only the first so many ranks; all do the same. Default: all, at most 64.
    """
    asked = step.asked(model, ["shard_parameters"], **machine.options())
    world = MeshShape.of(asked.sizes).world_size
    require_between("--ranks", ranks, 1, min(world, MOST_RANKS))
    require_place_for_file("--output", output)

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    with compile_progress():
        built, inputs = built_with_inputs(model, asked.tokens, asked.batch, asked.dtype, "meta", asked.settings)
        plan = spcompile.explain(built, inputs, mesh=asked.sizes, **asked.options)
    written = ranks or min(world, _WRITTEN)
    plan.save_trace(str(output), written)
    seconds = plan.predicted.total("seconds")
    of_all = f"{written} of {world} ranks; all do the same" if written < world else f"{world} ranks"
    print(f"{output}: a step of {1e3 * seconds:.4g} ms, {of_all}. Open it in ui.perfetto.dev.")
    return 0
