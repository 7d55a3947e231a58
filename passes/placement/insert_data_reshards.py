"""insert-data-reshards: what insert-reshards does, for axis `dp`.

Before: weights are read by every rank's own rows, sums over rows are parts. After: weights vary (their gradients are
summed over `dp`), sums are completed. What would need the rows of other ranks is an error: nobody has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from spcompile.diagnostics import BatchNotSplit, source_of
from spcompile.graph.reshard import Reshard, is_reshard
from spcompile.passes.placement.annotate_data_parallel import EXAMPLE as _LOSS
from spcompile.passes.placement.insert_reshards import InsertReshards
from spcompile.passes_api import Context
from spcompile.sharding.global_view import is_view
from spcompile.sharding.layout import layout_of
from spcompile.sharding.resharding import reshards_of

EXAMPLE = _LOSS


@dataclass(frozen=True)
class InsertDataReshards(InsertReshards):
    """Insert the reshards of axis `dp`."""

    name: ClassVar[str] = "insert-data-reshards"
    after: ClassVar[frozenset[str]] = frozenset({"annotate-data-parallel"})
    summary: ClassVar[str] = "sums losses and the gradients of weights over dp"
    axis: ClassVar[str | None] = "dp"
    split_axis: ClassVar[str] = "dp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Insert; returns how many.

        Raises:
            BatchNotSplit: an op reads the rows of other ranks.
        """
        count = super().run(gm, ctx)
        gathers = (*reshards_of(gm.graph, "dp", "S", "I"), *reshards_of(gm.graph, "dp", "S", "R"))
        for gather in (n for n in gathers if not is_view(Reshard.of(n).x, "dp")):
            user = next(iter(gather.users))
            while is_reshard(user):
                user = next(iter(user.users))
            shape = tuple(Reshard.of(gather).x.meta["val"].shape)
            layout = layout_of(user)
            why = "mixes rows of the batch" if layout is None or layout.call is not None else "has no sharding rule"
            found = f"{user.target} {why}: it reads {shape}, of which every rank of dp has its own rows"
            raise BatchNotSplit(found, where=source_of(user), legal="ops on each row alone, or DDP over dp")
        return count
