"""annotate-tensor-parallel: decide which weights are split over `tp`, and place what follows from it.

Before: the program of one `cp` rank, which every rank of `tp` would repeat. After: heads, hidden features and the
vocabulary are split; the activations between blocks are not yet (split-all-reduce and its neighbours see to that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.sizes import hint
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.index_spaces import IndexSpaces, find_index_spaces
from spcompile.sharding.layout import annotate
from spcompile.sharding.propagate import propagate
from spcompile.sharding.tensor_parallel import tensor_seeds


@dataclass(frozen=True)
class AnnotateTensorParallel(Pass):
    """Attach a NodeLayout to every node; axis `tp` spreads from heads, hidden features and the vocabulary."""

    name: ClassVar[str] = "annotate-tensor-parallel"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"lower", "split-projections"})
    summary: ClassVar[str] = "decides from the graph which weights are column-, row- and vocabulary-parallel"
    axis: ClassVar[str | None] = "tp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Annotate; rewrites nothing."""
        degree = ctx.mesh.size("tp")
        spaces = find_index_spaces(gm.graph)
        found = tensor_seeds(gm.graph, spaces, degree)
        annotate(gm.graph, "tp", spaces, propagate(gm.graph, spaces, found.seeds))
        _remark(found.kept, spaces, degree, ctx)
        return 0


def _remark(kept: list[fx.Node], spaces: IndexSpaces, degree: int, ctx: Context) -> None:
    for node, call in spaces.calls.items():
        groups = hint(call.rule.sizes.get("g", 1)) if call.rule.paired else degree
        if groups % degree:
            heads = groups * hint(call.rule.sizes.get("r", 1))
            text = f"{heads} heads in {groups} groups over tp = {degree}"
            ctx.remarks.add("SPR503", text, node, strict_error=False)
    for node in kept:
        ctx.remarks.add("SPR502", f"the weight of {node.target} is not split over tp", node, strict_error=False)


def _mlp(x_BSD: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    h_B1SD = x_BSD.unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).squeeze(1)
    n_BSD = torch.nn.functional.layer_norm(y_BSD, (y_BSD.shape[-1],))
    return x_BSD + torch.nn.functional.gelu(n_BSD @ up_DF) @ down_FD


def _inputs() -> tuple[Tensor, ...]:
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 4), (4, 6), (6, 4)))


EXAMPLE = Example(_mlp, _inputs, mesh=(("tp", 2),))
