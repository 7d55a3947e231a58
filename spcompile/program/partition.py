"""Where the joint graph is cut into forward and backward: by torch's partitioner, under a plan of memory.

The partitioner runs first. Where what it saves does not fit, the plan tags every value of the forward: saved, or made
again. The partitioner obeys tags, and runs once more. Where heads can run in stages, that joint graph is planned as
well, with rows in as many tiles, unless the first plan costs next to nothing or its peak would stay; the better plan
is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.graph.edit import copy_module
from spcompile.graph.storage import saved_values
from spcompile.memory.head_stages import may_lower, sends_groups, stage_heads
from spcompile.memory.joint import Joint
from spcompile.memory.planner import MemoryPlan, Wish, cheaper_plan, plan_memory
from spcompile.memory.row_tiles import TILES
from spcompile.memory.send_to_host import send_to_host
from spcompile.program.program_cache import sources
from spcompile.program.progress import begins
from spcompile.program.replayed_draws import is_kept_state, partitioned
from spcompile.schedule.op_cost import CostModel
from spcompile.torch_private import CustomPartitionerFn

Graphs = tuple[fx.GraphModule, fx.GraphModule]


@dataclass
class Partitioner(CustomPartitionerFn):
    """Cuts the joint graph of one program.

    base: the partitioner to ask. planned: is told what was chosen.
    """

    base: Callable[..., Graphs]
    wish: Wish
    cost: CostModel
    planned: Callable[[MemoryPlan], None]

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Graphs:
        """The forward and the backward graph."""
        spare = copy_module(gm) if self.wish.is_bounded and sends_groups(gm.graph) else None
        forward, backward, plan = self._cut_and_planned(gm, joint_inputs, kwargs)
        is_wanted = self.wish.least or not plan.fits or not plan.is_cheap
        is_wanted = is_wanted and spare is not None and may_lower(gm.graph, plan.peak.at, plan.saved)
        if spare is not None and is_wanted and (stages := stage_heads(spare.graph)):
            begins("planning memory with heads in stages")
            stages = replace(stages, seconds=max(0.0, self._seconds_of(spare.graph) - self._seconds_of(gm.graph)))
            tiles = plan.tiles.count if plan.tiles is not None else 1
            other, behind, staged = self._cut_and_planned(spare, joint_inputs, kwargs, tiles)
            staged = replace(staged, stages=stages, as_it_was=plan.as_it_was, ends_as_it_was=plan.ends_as_it_was)
            if cheaper_plan(plan, staged, self.wish.least) is staged:
                gm, forward, backward, plan = spare, other, behind, staged
        self.planned(plan)
        if plan.trades:
            forward, backward = cut_as_planned(self.base, gm, joint_inputs, plan.saved, plan.again, kwargs)
        if plan.away is not None:
            send_to_host(forward, backward, {node.name for node in plan.away.values})
        if plan.tiles is not None:
            for part in (forward, backward):
                part.graph.output_node().meta[TILES] = plan.tiles.count
        return forward, backward

    def _cut_and_planned(
        self, gm: fx.GraphModule, joint_inputs: Any, kwargs: Mapping[str, Any], tiles: int | None = None
    ) -> tuple[fx.GraphModule, fx.GraphModule, MemoryPlan]:
        """What the partitioner alone makes of a joint graph, and the plan for it. tiles: as of `plan_memory`."""
        forward, backward = partitioned(self.base, gm, joint_inputs, kwargs)
        saved = saved_by(gm, forward, backward)
        begins("planning memory")
        early = not self.wish.least
        joint = Joint.of(gm.graph, kwargs["num_fwd_outputs"], self.cost.accelerator, self.cost.fuses, early)
        return forward, backward, plan_memory(joint, saved, self.cost, self.wish, tiles)

    def _seconds_of(self, graph: fx.Graph) -> float:
        """Of all calls of a joint graph, one after the other."""
        cost = self.cost.of_one_graph()
        return sum(cost.work(node).seconds for node in graph.nodes if node.op == "call_function")

    def __deepcopy__(self, memo: Any) -> Partitioner:
        """Itself: Inductor copies its settings, and this one holds the program."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For keys of torch's caches, which hold all settings: what decides."""
        return bytes, (self.uuid(),)

    def uuid(self) -> bytes:
        """All that decides, beside the graph, on what is saved."""
        return f"{sources()} {self.wish} {self.cost}".encode()


def saved_by(joint: fx.GraphModule, forward: fx.GraphModule, backward: fx.GraphModule) -> list[fx.Node]:
    """The calls of a joint graph that what a partitioner made of it saves; states of generators are none of them."""
    here = {node.name: node for node in joint.graph.nodes}
    saved = [node for node in saved_values(forward.graph, backward.graph) if node.op == "call_function"]
    return [here[node.name] for node in saved if not is_kept_state(node)]


def cut_as_planned(
    base: Callable[..., Graphs],
    joint: fx.GraphModule,
    inputs: Any,
    saved: Iterable[fx.Node],
    again: Iterable[fx.Node],
    arguments: Mapping[str, Any],
) -> Graphs:
    """Run a partitioner once more on a joint graph, of which every value of the forward is tagged.

    again: the calls of the forward that the backward makes again. arguments: what the partitioner takes besides.
    """
    for node in again:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        # It would save what stands between two checkpointed regions (torch 2.13: cleanup_recompute_tags).
        node.meta.pop("ac_graph_id", None)
    for node in saved:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    with torch._functorch.config.patch(cse=False):  # the first run has left none
        return partitioned(base, joint, inputs, arguments)
