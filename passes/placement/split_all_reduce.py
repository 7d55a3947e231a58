"""split-all-reduce: AllReduce = ReduceScatter, then AllGather, along the sequence.

Before: reshard(x, tp, P, I). After: reshard(reshard(x, tp, P, S(seq)), tp, S(seq), I). The same bytes on the wire
(Korthikanti et al. 2022), but the AllGather can now move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from spcompile.graph.reshard import Reshard
from spcompile.passes.placement.annotate_sharding import MLP
from spcompile.passes_api import Context, RewritePass, Stage
from spcompile.sharding.resharding import families_of_sequences, reshard_to, reshards_of, sequence_place

EXAMPLE = MLP


@dataclass(frozen=True)
class SplitAllReduce(RewritePass):
    """Split every AllReduce of a value that has a sequence."""

    name: ClassVar[str] = "split-all-reduce"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"insert-tensor-reshards"})
    summary: ClassVar[str] = "splits AllReduce into ReduceScatter and AllGather along the sequence"
    axis: ClassVar[str | None] = "tp"

    def rewrites(self, gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        """Split one after the other; those of values without a sequence stay."""
        sequences = families_of_sequences(gm.graph)
        for node in reshards_of(gm.graph, "tp", "P", "I"):
            value = Reshard.of(node).x
            place = sequence_place(value, sequences)
            if place is None:
                continue
            part = reshard_to(value, "tp", "P", place, origin=self.name)
            node.replace_all_uses_with(reshard_to(part, "tp", place, "I", origin=self.name))
            gm.graph.erase_node(node)
            yield part
