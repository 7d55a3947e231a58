"""What is said of a plan of memory: a remark about what it chose, an error where nothing fits."""

from __future__ import annotations

from spcompile.diagnostics import HostMemoryExceeded, OutOfMemory, Remarks
from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.mesh import MeshShape
from spcompile.memory.planner import MemoryPlan


def remark_memory(plan: MemoryPlan, remarks: Remarks) -> None:
    """Say in one line what is made again and what that costs; nothing where nothing changes."""
    limit = "" if plan.limit is None else f" (limit {bytes_text(plan.limit)})"
    if plan.trades:
        won = sum(trade.bytes for trade in plan.trades)
        remarks.add(
            "SPR601",
            f"{bytes_text(won)} of {len(plan.trades)} values are made again instead of saved, for "
            f"{1e3 * plan.seconds:.3g} ms a step: a step takes {bytes_text(plan.total)} in all instead of "
            f"{bytes_text(plan.as_it_was)}{limit}",
            strict_error=False,
        )
    if plan.tiles is not None:
        found = f"{len(plan.tiles.parts)} wide row-wise parts run over {plan.tiles.count} tiles of rows"
        less = f"{bytes_text(plan.tiles.bytes)} of the largest never stand whole, for {1e3 * plan.tiles.seconds:.3g} ms"
        remarks.add("SPR606", f"{found}: {less} a step", strict_error=False)
    if plan.stages is not None:
        found = f"heads run in {plan.stages.count} stages behind {len(plan.stages.products)} products"
        less = (
            f"{bytes_text(plan.stages.bytes)} of the largest never stand whole, for {1e3 * plan.stages.seconds:.3g} ms"
        )
        remarks.add("SPR607", f"{found}: {less} a step", strict_error=False)
    if plan.away is not None:
        copies = f"{1e3 * plan.away.seconds:.3g} ms of their copies are not hidden by compute"
        remarks.add("SPR604", f"{_host_bytes(plan)}, {len(plan.away.values)} values; {copies}", strict_error=False)
    if not plan.host_fits:
        remarks.add("SPR605", _host_too_small(plan), strict_error=False)
    if plan.blocks is not None and not plan.blocks.period:
        remarks.add("SPR602", "no blocks that repeat were found along the residual stream", strict_error=False)
    if not plan.fits:
        remarks.add("SPR603", _too_large(plan), strict_error=False)


def require_memory(plan: MemoryPlan | None, mesh: MeshShape) -> None:
    """Raises OutOfMemory or HostMemoryExceeded where a step does not fit, with what would help."""
    if plan is None or (plan.fits and plan.host_fits):
        return
    ranks = f"more than {mesh.world_size} ranks on cp or tp" if mesh.world_size > 1 else "several ranks on cp or tp"
    if not plan.host_fits:
        legal = f"{ranks}, fewer tokens, or host_memory= where the host has more"
        raise HostMemoryExceeded(_host_too_small(plan), legal=legal)
    raise OutOfMemory(
        _too_large(plan),
        legal=f"{ranks}, parallelize with shard_parameters, fewer tokens, optimizer= as it is, or memory='speed'",
    )


def _host_bytes(plan: MemoryPlan) -> str:
    shared = f", {bytes_text(plan.ranks * plan.host_bytes)} on a node of {plan.ranks} ranks" if plan.ranks > 1 else ""
    return f"{bytes_text(plan.host_bytes)} wait in the memory of the host for the backward{shared}"


def _host_too_small(plan: MemoryPlan) -> str:
    return f"{_host_bytes(plan)}; host_memory allows {bytes_text(plan.ranks * plan.host_limit)}"


def _too_large(plan: MemoryPlan) -> str:
    assert plan.limit is not None
    return (
        f"a step takes at least {bytes_text(plan.total)} on one rank, of which {bytes_text(plan.state_bytes)} are "
        f"parameters, other inputs and states of the optimizer; the limit is {bytes_text(plan.limit)}"
    )
