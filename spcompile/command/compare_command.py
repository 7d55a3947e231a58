"""`spcompile compare`: the ways to use so many ranks, side by side, at several lengths."""

from __future__ import annotations

import json as json_text

from spcompile.command.arguments import parse_tokens, require_between
from spcompile.command.flags import Json, OnAnyMesh
from spcompile.machine.mesh import MOST_RANKS
from spcompile.options import Options as BackendOptions


def compare(
    model: str,
    /,
    *,
    world: int = 8,
    seq: str = "32k,128k,1M",
    on: OnAnyMesh = OnAnyMesh(),
    json: Json = False,
) -> int:
    """Show memory, bytes sent and time of tp, of rings, of Ulysses and of hybrids of both; needs no devices.

    Args:
        model: The model, see above.
        world: Ranks in all.
        seq: Tokens in a row, several lengths: 32k,128k,1M.
    """
    lengths = list(dict.fromkeys(parse_tokens("--seq", text) for text in seq.split(",")))
    require_between("--world", world, 2, MOST_RANKS)
    asked = on.asked(model)
    BackendOptions.parse(asked.options)

    import spcompile
    from spcompile.command.compile_progress import compile_progress
    from spcompile.command.model_spec import built_with_inputs

    found = None
    with compile_progress():
        for length in lengths:
            built, inputs = built_with_inputs(model, length, asked.batch, asked.dtype, "meta", asked.settings)
            one = spcompile.compare(built, inputs, world, workers=on.workers, **asked.options)
            found = one if found is None else found + one
    assert found is not None
    print(json_text.dumps(found.to_dict()) if json else str(found), end="" if not json else "\n")
    return 0
