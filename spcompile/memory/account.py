"""The memory of one rank: what is held all along, what is saved for the backward, and the most that is alive at once.

Read off the final graphs, so that it holds for the order in which calls really run. A view counts as its base: that is
the storage that stays alive. What Inductor fuses away is not counted (`spcompile/memory/fusion.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor

from spcompile.collectives.host_copy import TO_DEVICE, TO_HOST, WAIT_COPY
from spcompile.diagnostics import SourceLine, source_of
from spcompile.graph.sizes import hint
from spcompile.graph.storage import outputs_of, root_of, saved_pairs, saved_values, storage_bytes, storage_size
from spcompile.machine.accelerators import Accelerator
from spcompile.machine.optimizers import Optimizer
from spcompile.memory.fusion import fused_away
from spcompile.memory.head_stages import HeadStages
from spcompile.memory.inside_calls import bytes_inside
from spcompile.memory.liveness import Lives
from spcompile.memory.plan_search import Tiles
from spcompile.memory.planner import MemoryPlan


@dataclass(frozen=True)
class Action:
    """What was done to save memory, for all layers alike at once. bytes: no longer saved on the rank.

    kind: "recompute", "offload": to the memory of the host, "tile" or "stage": bytes are those of one layer, no longer
    alive.

    seconds: that it costs a step. source: the user's line whose results are not saved.
    """

    kind: str
    count: int
    bytes: int
    seconds: float
    op: str
    source: SourceLine | None


@dataclass(frozen=True)
class PhaseMemory:
    """When most is alive in one final graph, parameters and states aside. kept: saved values, gradients, results.

    transient: what is neither. where: the call at that time.
    """

    phase: str
    kept: sympy.Expr
    transient: sympy.Expr
    where: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    saved_activation_bytes: kept from forward to backward, inputs and parameters not counted.
    saved_activation_bytes_one_device: the same for the unsharded model, with the same attention ops and partitioner.
    peak_bytes: parameters, gradients and the most that is alive at once.
    optimizer_bytes: of the states of the optimizer that the options name. total_bytes: with them, the peak of all.
    transient_bytes: at the peak, what is neither saved nor a gradient. peak_at: the call at the peak.
    host_bytes: of this rank's values in the host's memory. host_node_bytes: of all ranks of a node.
    host_limit_bytes: of a node.
    budget_bytes: what total_bytes was to stay within; None: no limit. fits: whether it does.
    """

    saved_activation_bytes: sympy.Expr
    saved_activation_bytes_one_device: sympy.Expr
    parameter_bytes: sympy.Expr
    gradient_bytes: sympy.Expr
    peak_bytes: sympy.Expr
    optimizer_bytes: sympy.Expr
    transient_bytes: sympy.Expr
    host_bytes: sympy.Expr
    host_node_bytes: sympy.Expr
    host_limit_bytes: int
    total_bytes: sympy.Expr
    budget_bytes: int | None
    fits: bool
    peak_at: str
    actions: tuple[Action, ...]
    phases: tuple[PhaseMemory, ...] = ()


def memory_of(
    sharded: Mapping[str, fx.GraphModule],
    alone: sympy.Expr,
    parameters: Iterable[torch.Tensor],
    optimizer: Optimizer,
    accelerator: Accelerator,
    plan: MemoryPlan | None = None,
    fuses: bool = False,
) -> Memory:
    """From the final graphs of one rank, by phase. alone: what one device saves. plan: what was chosen for the rank.

    fuses: the graphs' compiler fuses elementwise calls.
    """
    held = [_held(p) for p in parameters]
    trained = [_held(p) for p in parameters if p.requires_grad and "backward" in sharded]
    states = sum(optimizer.bytes(p.numel(), p.element_size()) for p in trained)
    highs = {phase: _high_water(phase, sharded, accelerator, fuses) for phase in sharded}
    high = max(highs.values(), key=lambda found: found.hint)
    parameter_bytes = sum(p.numel() * p.element_size() for p in held)
    limit, ranks = (plan.limit, plan.ranks) if plan is not None else (None, 1)
    return Memory(
        saved_activation_bytes=saved_bytes(sharded),
        saved_activation_bytes_one_device=alone,
        parameter_bytes=sympy.Integer(parameter_bytes),
        gradient_bytes=sympy.Integer(sum(p.numel() * p.element_size() for p in trained)),
        peak_bytes=parameter_bytes + high.size,
        optimizer_bytes=sympy.Integer(states),
        transient_bytes=high.transient,
        host_bytes=host_bytes(sharded),
        host_node_bytes=ranks * host_bytes(sharded),
        host_limit_bytes=ranks * plan.host_limit if plan is not None else 0,
        total_bytes=parameter_bytes + states + high.size,
        budget_bytes=limit,
        fits=(limit is None or parameter_bytes + states + high.hint <= limit) and (plan is None or plan.host_fits),
        peak_at=high.where,
        actions=actions_of(plan) if plan is not None else (),
        phases=tuple(PhaseMemory(at, h.size - h.transient, h.transient, h.where) for at, h in highs.items()),
    )


def _held(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter."""
    local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return local


def saved_bytes(graphs: Mapping[str, fx.GraphModule]) -> sympy.Expr:
    """Bytes of the distinct storages that "forward" returns for "backward"."""
    if "forward" not in graphs or "backward" not in graphs:
        return sympy.Integer(0)
    kept = {root_of(node) for node in saved_values(graphs["forward"].graph, graphs["backward"].graph)}
    return _total(node for node in kept if node.op == "call_function" and not on_host(node))


def host_bytes(graphs: Mapping[str, fx.GraphModule]) -> sympy.Expr:
    """Bytes of what the forward leaves in the memory of the host."""
    return _total(
        graphs["forward"].graph.find_nodes(op="call_function", target=TO_HOST.op) if "forward" in graphs else ()
    )


def on_host(root: fx.Node) -> bool:
    """Whether a storage is in the memory of the host: what a copy made, or an input that is only copied back."""
    if root.op == "placeholder":
        return bool(root.users) and all(user.target in (TO_DEVICE.op, WAIT_COPY) for user in root.users)
    return root.target is TO_HOST.op


@dataclass(frozen=True)
class _High:
    """The most that is alive in a graph, parameters aside. hint: size at traced sizes."""

    hint: int
    size: sympy.Expr
    transient: sympy.Expr
    where: str


def _high_water(phase: str, graphs: Mapping[str, fx.GraphModule], accelerator: Accelerator, fuses: bool) -> _High:
    """In the backward, what the forward gave its caller is alive as well."""
    order, lives, levels, stay = _alive(phase, graphs, accelerator, fuses)
    at = levels.index(max(levels))
    there = [root for root in lives.during(at) if not _is_held(root) and not on_host(root)]
    scratch = bytes_inside(order[at], accelerator) if order else sympy.Integer(0)
    outside = _given_to_caller(graphs) if phase == "backward" else []
    return _High(
        levels[at],
        _total([*there, *outside]) + scratch,
        _total(root for root in there if root not in stay) + scratch,
        _where(phase, order[at]) if order else phase,
    )


def bytes_alive(phase: str, graphs: Mapping[str, fx.GraphModule], accelerator: Accelerator, fuses: bool) -> list[int]:
    """During each call of a final graph, parameters aside, at traced sizes."""
    return _alive(phase, graphs, accelerator, fuses)[2]


def _alive(
    phase: str, graphs: Mapping[str, fx.GraphModule], accelerator: Accelerator, fuses: bool
) -> tuple[list[fx.Node], Lives, list[int], set[fx.Node]]:
    """(calls, lives of storages, bytes during each call, storages that are there before or stay behind)."""
    graph, storage = graphs[phase].graph, _storages_in(phase, graphs)
    order = [node for node in graph.nodes if node.op != "output"]
    before = {storage(node): None for node in order if node.op == "placeholder" and not _is_held(storage(node))}
    returned = {storage(node) for node in outputs_of(graph) if isinstance(node, fx.Node)}
    inside = fused_away(order, returned, storage) if fuses else ()
    lives = Lives.of(order, before, returned, storage, inside)
    sizes = {root: 0 if _is_held(root) or on_host(root) else storage_bytes(root) for root in lives.born}
    outside = sum(map(storage_bytes, _given_to_caller(graphs))) if phase == "backward" else 0
    levels = lives.bytes(sizes.__getitem__, [int(bytes_inside(node, accelerator, hint)) for node in order]) or [0]
    return order, lives, [level + outside for level in levels], before.keys() | returned


def _storages_in(phase: str, graphs: Mapping[str, fx.GraphModule]) -> Callable[[fx.Node], fx.Node]:
    """`root_of`. Of what the backward takes the forward's: two views of one storage may be saved."""
    if phase != "backward":
        return root_of
    pairs = saved_pairs(graphs["forward"].graph, graphs["backward"].graph)
    of_forward = {taken: root_of(value) for value, taken in pairs}

    def storage(node: fx.Node) -> fx.Node:
        root = root_of(node)
        return of_forward.get(root, root)

    return storage


def _is_held(node: fx.Node) -> bool:
    """Inputs of the whole program, of which nearly all bytes are parameters: they are counted once, on their own."""
    return node.op == "placeholder" and "primals" in str(node.target)


def _given_to_caller(graphs: Mapping[str, fx.GraphModule]) -> list[fx.Node]:
    """What the forward returns and does not save: it is the caller's until the end of the step."""
    forward = graphs["forward"].graph
    saved = {root_of(node) for node in saved_values(forward, graphs["backward"].graph)}
    found = {root_of(node): None for node in outputs_of(forward) if isinstance(node, fx.Node)}
    return [root for root in found if root not in saved and root.op == "call_function"]


def _total(roots: Iterable[fx.Node]) -> sympy.Expr:
    return sum(map(storage_size, roots), sympy.Integer(0))


def _where(phase: str, node: fx.Node) -> str:
    source = source_of(node)
    place = f" of {source.file.rpartition('/')[2]}:{source.line}" if source is not None else ""
    return f"{phase}, {node.name}{place}"


def actions_of(plan: MemoryPlan) -> tuple[Action, ...]:
    """What was done of one kind, which layers alike have in common, as one row, the largest first.

    Seconds of copies that nothing hides are divided among them by bytes.
    """
    done = [("recompute", trade.given_up[0], trade.bytes, trade.seconds) for trade in plan.trades]
    if plan.away is not None:
        sizes = [(node, storage_bytes(root_of(node))) for node in plan.away.values]
        done += [("offload", node, size, plan.away.seconds * size / plan.away.bytes) for node, size in sizes]
    rows: dict[tuple[str, str, SourceLine | None], Action] = {}
    for kind, node, size, seconds in done:
        root = root_of(node)
        op, source = getattr(root.target, "__name__", str(root.target)), source_of(root)
        before = rows.get((kind, op, source), Action(kind, 0, 0, 0.0, op, source))
        total = before.bytes + size, before.seconds + seconds
        rows[kind, op, source] = Action(kind, before.count + 1, *total, op, source)
    return (*sorted(rows.values(), key=lambda row: -row.bytes), *_tiled(plan.tiles), *_staged(plan.stages))


def _tiled(tiles: Tiles | None) -> list[Action]:
    if tiles is None:
        return []
    first = tiles.parts[0]
    op = getattr(first.target, "__name__", str(first.target))
    return [Action("tile", len(tiles.parts), tiles.bytes, tiles.seconds, op, source_of(first))]


def _staged(stages: HeadStages | None) -> list[Action]:
    if stages is None:
        return []
    return [Action("stage", len(stages.products), stages.bytes, stages.seconds, stages.op, stages.source)]
