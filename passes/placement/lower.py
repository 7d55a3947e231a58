"""lower: global shapes become one rank's shapes, reshards become collectives.

Before: the user's shapes, reshards that mean the identity. After: the program of one rank, the same text on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture.capture import OWN, fake_inputs
from spcompile.graph.reshard import is_reshard
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.global_view import views
from spcompile.sharding.layout import layout_of
from spcompile.sharding.lowering import Lower, SplitDims
from spcompile.sharding.resharding import state_of


@dataclass(frozen=True)
class LowerToLocal(Pass):
    """Trace the global graph on one rank's shapes."""

    name: ClassVar[str] = "lower"
    stage: ClassVar[Stage] = Stage.GLOBAL
    leaves: ClassVar[Stage | None] = Stage.LOCAL
    after: ClassVar[frozenset[str]] = frozenset({"insert-reshards"})
    summary: ClassVar[str] = "turns global shapes into per-rank shapes and reshards into spx collectives"

    split_axis: ClassVar[str] = "cp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Replace the graph by its local form; returns the number of reshards and global views lowered."""
        annotated = [n for n in views(gm.graph, self.split_axis) if layout_of(n) is not None]
        count = sum(is_reshard(n) for n in gm.graph.nodes) + len(annotated)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        own = [n.meta.get(OWN, n.meta["val"]) for n in placeholders]
        if not count and all(n.meta["val"] is value for n, value in zip(placeholders, own, strict=True)):
            return 0
        mode, fakes = fake_inputs(own)
        split = self.split(ctx)
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

    def split(self, ctx: Context) -> SplitDims:
        """How dims are laid out over the axis."""
        axis = self.split_axis
        return SplitDims(axis, ctx.mesh.size(axis), ctx.order if axis == "cp" else "contiguous")


def _attention_and_loss(x_BSD: Tensor, w_DD: Tensor, labels_BS: Tensor) -> Tensor:
    h_B1SD = (x_BSD @ w_DD).unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1)
    return torch.nn.functional.cross_entropy(y_BSD[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def _inputs() -> tuple[Tensor, ...]:
    x_BSD, w_DD = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 4), (4, 4)))
    return x_BSD, w_DD, torch.randint(0, 4, (2, 7))


EXAMPLE = Example(_attention_and_loss, _inputs)
