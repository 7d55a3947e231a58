"""annotate-sharding: find the sequence and place every value.

Before: a graph that knows what it computes but not where. After: every node carries its index spaces and, where the
attention's query rows reach it, the factor over which it can run sharded. Nothing is rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.index_spaces import find_index_spaces
from spcompile.sharding.layout import annotate
from spcompile.sharding.propagate import SCORES, propagate, sequence_seeds


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
            _remark_no_sequence(gm.graph, ctx)
        for node in (n for n in seeds if SCORES in n.meta.get("custom", {})):
            text = f"attention at {node.name}: what reads the weights is no product with values; split by query rows"
            ctx.remarks.add("SPR202", text, node)
        if ctx.mesh.size("cp") == 1:
            seeds = {}
        annotate(gm.graph, "cp", spaces, propagate(gm.graph, spaces, seeds))
        return 0


def _remark_no_sequence(graph: fx.Graph, ctx: Context) -> None:
    attention = next(iter(graph.find_nodes(op="call_function", target=torch.ops.spx.attention.default)), None)
    if attention is None:
        ctx.remarks.add("SPR101", "no attention over a sequence was found; the graph runs replicated")
    else:
        ctx.remarks.add("SPR301", "every query has length 1; the graph runs replicated", attention, strict_error=False)


def _attention_over_flat_rows(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    B, S, D = x_BSD.shape
    h_RD = x_BSD.reshape(B * S, D) @ w_DD
    h_B1SD = h_RD.reshape(B, 1, S, D)
    y_B1SD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD)
    return y_B1SD.squeeze(1) + x_BSD


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 4), (4, 4)))


EXAMPLE = Example(_attention_over_flat_rows, _inputs)
