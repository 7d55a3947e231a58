"""lower: global shapes become one rank's shapes, reshards become collectives.

Before: the user's shapes, reshards that mean the identity. After: the program of one rank, the same text on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from spcompile.capture import fake_inputs
from spcompile.lowering import Lower, SplitDims
from spcompile.passes_api import Context, Pass, Stage


@dataclass(frozen=True)
class LowerToLocal(Pass):
    """Trace the global graph on one rank's shapes."""

    name: ClassVar[str] = "lower"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"insert-reshards"})
    summary: ClassVar[str] = "turns global shapes into per-rank shapes and reshards into spx collectives"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Replace the graph by its local form; returns the number of reshards lowered."""
        from spcompile.reshard import is_reshard

        count = sum(is_reshard(n) for n in gm.graph.nodes)
        if not count:
            return 0
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        mode, fakes = fake_inputs([n.meta["val"] for n in placeholders])
        split = SplitDims("cp", ctx.mesh.size("cp"), ctx.order)
        with mode, fx.traceback.preserve_node_meta():
            local = make_fx(Lower(gm, split).run, pre_dispatch=True)(*fakes)
        for new, old in zip((n for n in local.graph.nodes if n.op == "placeholder"), placeholders, strict=True):
            new._rename(old.name)
            new.target = new.name
        local.graph.eliminate_dead_code()
        for node in local.graph.nodes:
            if node.op == "call_function" and "stack_trace" not in node.meta:
                node.meta["spx_origin"] = "lower"
        for node in local.graph.nodes:
            if node.op == "get_attr":
                setattr(gm, node.target, getattr(local, node.target))
        gm.graph = local.graph
        gm.recompile()
        return count
