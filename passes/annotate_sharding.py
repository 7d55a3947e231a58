"""annotate-sharding: find the sequence and place every value.

Before: a graph that knows what it computes but not where. After: every node carries its index spaces and, where the
attention's query rows reach it, the factor over which it can run sharded. Nothing is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from spcompile.index_spaces import find_index_spaces
from spcompile.layout import NodeLayout, show
from spcompile.passes_api import Context, Pass, Stage
from spcompile.propagate import Placements, propagate, sequence_seeds


@dataclass(frozen=True)
class AnnotateSharding(Pass):
    """Attach a NodeLayout to every node; axis `cp` spreads from the query rows of every attention."""

    name: ClassVar[str] = "annotate-sharding"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-attention", "recognize-mask"})
    summary: ClassVar[str] = "finds the sequence and places every value, from the factor rules"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Annotate; rewrites nothing."""
        spaces = find_index_spaces(gm.graph)
        seeds = sequence_seeds(spaces)
        if not seeds:
            ctx.remarks.add("SPR101", "no attention over a sequence was found; the graph runs replicated")
        placements = propagate(gm.graph, spaces, seeds)
        for node in gm.graph.nodes:
            node.meta.pop("layout", None)
            node.meta.pop("sharding", None)
            if node in spaces.values:
                node.meta["layout"] = _layout(node, spaces.values[node], spaces.calls.get(node), placements)
        return 0


def _layout(node, dims, call, placements: Placements) -> NodeLayout:  # type: ignore[no-untyped-def]
    layout = NodeLayout(dims, call)
    if node in placements.choices:
        layout.choice["cp"] = placements.choices[node]
    for number in range(len(dims)):
        place = placements.places.get((node, number))
        if place is not None:
            layout.places.setdefault("cp", {})[number] = place
            show(node, "cp", str(place))
    return layout
