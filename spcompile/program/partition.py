"""Where the joint graph is cut into forward and backward: by torch's partitioner, under a plan of memory.

The partitioner runs first. Where what it saves does not fit, the plan tags every value of the forward: saved, or made
again. The partitioner obeys tags, and runs once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from spcompile.graph.storage import saved_values
from spcompile.memory.joint import Joint
from spcompile.memory.planner import MemoryPlan, Wish, plan_memory
from spcompile.program.program_cache import sources
from spcompile.program.progress import begins
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
        forward, backward = self.base(gm, joint_inputs, **kwargs)
        here = {node.name: node for node in gm.graph.nodes}
        saved = [here[node.name] for node in saved_values(forward.graph, backward.graph) if node.op == "call_function"]
        begins("planning memory")
        joint = Joint.of(gm.graph, kwargs["num_fwd_outputs"], self.cost.accelerator, self.cost.fuses)
        plan = plan_memory(joint, saved, self.cost, self.wish)
        self.planned(plan)
        if not plan.trades:
            return forward, backward
        for node in plan.again:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            # It would save what stands between two checkpointed regions (torch 2.13: cleanup_recompute_tags).
            node.meta.pop("ac_graph_id", None)
        for node in plan.saved:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        with torch._functorch.config.patch(cse=False):  # the first run has left none
            return self.base(gm, joint_inputs, **kwargs)

    def __deepcopy__(self, memo: Any) -> Partitioner:
        """Itself: Inductor copies its settings, and this one holds the program."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For keys of torch's caches, which hold all settings: what decides."""
        return bytes, (self.uuid(),)

    def uuid(self) -> bytes:
        """All that decides, beside the graph, on what is saved."""
        return f"{sources()} {self.wish} {self.cost}".encode()
