"""lower: global shapes become one rank's shapes, reshards become collectives.

Before: the user's shapes, reshards that mean the identity. After: the program of one rank, the same text on all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.retrace import OWN, fake_inputs
from spcompile.graph.reshard import is_reshard
from spcompile.passes.placement.annotate_sharding import LOSS_OF_ENTRIES, MLP, attention_and_loss
from spcompile.passes_api import AxisPass, Context, Example, OnAxis, Stage
from spcompile.sharding.global_view import views
from spcompile.sharding.layout import layout_of
from spcompile.sharding.lowering import Lower
from spcompile.sharding.resharding import state_of
from spcompile.sharding.split_dims import SplitDims


@dataclass(frozen=True)
class LowerToLocal(AxisPass):
    """Trace the global graph on one rank's shapes."""

    stage: ClassVar[Stage] = Stage.GLOBAL
    leaves: ClassVar[Stage | None] = Stage.LOCAL
    on: ClassVar[Mapping[str, OnAxis]] = {
        "dp": OnAxis(
            "lower-data-parallel",
            frozenset({"insert-data-reshards"}),
            "turns the shapes of the whole batch into those of a rank's entries, and reshards into spx collectives",
        ),
        "cp": OnAxis(
            "lower",
            frozenset({"insert-reshards"}),
            "turns global shapes into per-rank shapes and reshards into spx collectives",
        ),
        "tp": OnAxis(
            "lower-tensor-parallel",
            frozenset({"cancel-collectives"}),
            "turns the reshards of axis tp into spx collectives",
        ),
    }

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Replace the graph by its local form; returns the number of reshards and global views lowered."""
        annotated = [n for n in views(gm.graph, self.axis) if layout_of(n) is not None]
        count = sum(is_reshard(n) for n in gm.graph.nodes) + len(annotated)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        own = [n.meta.get(OWN, n.meta["val"]) for n in placeholders]
        if not count and all(n.meta["val"] is value for n, value in zip(placeholders, own, strict=True)):
            return 0
        mode, fakes = fake_inputs(own)
        split = SplitDims(self.axis, ctx.mesh.size(self.axis), ctx.order if self.axis == "cp" else "contiguous")
        with mode, fx.traceback.preserve_node_meta():
            local = make_fx(Lower(gm, split).run, pre_dispatch=True)(*fakes)
        for new, old in zip((n for n in local.graph.nodes if n.op == "placeholder"), placeholders, strict=True):
            new._rename(old.name)
            new.target = new.name
            kept = ("trainable", "state", "parts")
            new.meta.update({key: old.meta[key] for key in kept if key in old.meta})
            place = state_of(old, split.axis)
            if place != "I":
                new.meta["parts"] = {**new.meta.get("parts", {}), split.axis: "S"}
        local.graph.eliminate_dead_code()
        for node in local.graph.nodes:
            if node.op == "call_function" and "stack_trace" not in node.meta:
                node.meta["spx_origin"] = "lower"
        for node in local.graph.nodes:
            if node.op == "get_attr":
                setattr(gm, node.target, getattr(local, node.target))
        gm.graph = local.graph
        return count or len(placeholders)


def _inputs() -> tuple[Tensor, ...]:
    x_BSD, w_DD = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 4), (4, 4)))
    return x_BSD, w_DD, torch.randint(0, 4, (2, 7))


EXAMPLE = {"dp": LOSS_OF_ENTRIES, "cp": Example(attention_and_loss, _inputs), "tp": MLP}
