"""annotate-data-parallel: place the rows of the batch, of which every rank of `dp` passes its own.

Before: a graph of the whole batch. After: every value that has rows is split over `dp`, and everything that sums over
rows leaves a part of a sum.
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
from spcompile.sharding.propagate import propagate
from spcompile.sharding.row_blocks import write_blocks
from spcompile.sharding.rows import inputs_with_rows, require_rows


@dataclass(frozen=True)
class AnnotateDataParallel(Pass):
    """Attach a NodeLayout to every node; axis `dp` spreads from the inputs that have rows."""

    name: ClassVar[str] = "annotate-data-parallel"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-attention", "recognize-mask", "recognize-loss"})
    summary: ClassVar[str] = "places the rows of the batch, of which each rank of dp has its own"
    axis: ClassVar[str | None] = "dp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Annotate; returns how many joins and cuts of rows were rewritten.

        Raises:
            BatchNotSplit: attention over something else than rows, or rows that cannot be told from something else.
        """
        inputs = inputs_with_rows(gm.graph)
        blocks = write_blocks(gm.graph, inputs)
        spaces = find_index_spaces(gm.graph, drawn_apart=True)
        placements = propagate(gm.graph, spaces, {}, inputs)
        require_rows(gm.graph, spaces, placements)
        annotate(gm.graph, "dp", spaces, placements)
        return blocks


def _loss_of_rows(x_BSD: Tensor, w_DD: Tensor, labels_BS: Tensor) -> Tensor:
    h_B1SD = (x_BSD @ w_DD).unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1)
    return torch.nn.functional.cross_entropy(y_BSD[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def _inputs() -> tuple[Tensor, ...]:
    w_DD = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    return torch.randn(12, 7, 4, dtype=torch.float64), w_DD, torch.randint(0, 4, (12, 7))


EXAMPLE = Example(_loss_of_rows, _inputs, mesh=(("dp", 2),))
