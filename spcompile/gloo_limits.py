"""What gloo cannot do.

torch 2.13 (CPU) corrupts its heap, within some ten thousand collectives, where an all-to-all of one process group is
in flight beside an all-gather of another: plain calls of torch.ops._c10d_functional on four processes show it. The same
test showed nothing for all-to-alls that are waited for at once, as in REORDER, and for the point-to-point messages of
rings, beside all-gathers, reduce-scatters and all-reduces of the same group or another (38,000 to 72,000 calls each).
"""

from __future__ import annotations

from collections.abc import Sequence

from spcompile.collectives import ALL_TO_ALL
from spcompile.program import LocalProgram

ORDERING = "overlap-collectives"


def one_after_the_other_on_gloo(program: LocalProgram, axes: Sequence[str]) -> None:
    """Leave every wait behind its start where a program exchanges over one group and communicates over others too.

    axes: all axes, and parts of axes, on which it communicates.
    """
    exchanges = program.gm.graph.find_nodes(op="call_function", target=ALL_TO_ALL.op)
    if not exchanges or len(axes) < 2:
        return
    if any(p.name == ORDERING for p in program.schedule):
        text = f"exchanges over one of the groups {', '.join(axes)}: no collective is overlapped"
        program.ctx.remarks.add("SPR206", text, exchanges[0], strict_error=False)
        program.schedule = [p for p in program.schedule if p.name != ORDERING]
