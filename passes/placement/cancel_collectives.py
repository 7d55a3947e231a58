"""cancel-collectives: two changes of state that undo each other, or are one, become none, or one.

S -> I -> S    the same place: nothing
S -> I -> R    S -> R: the gradient, a sum in parts, is reduce-scattered instead of reduced and then cut
P -> I -> S    P -> S: a ReduceScatter
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from spcompile.graph.reshard import Reshard, is_reshard
from spcompile.passes.placement.annotate_sharding import MLP
from spcompile.passes_api import Context, RewritePass, Stage
from spcompile.sharding.global_view import is_view
from spcompile.sharding.resharding import reshard_to

EXAMPLE = MLP


@dataclass(frozen=True)
class CancelCollectives(RewritePass):
    """Join neighbouring reshards of `tp`."""

    name: ClassVar[str] = "cancel-collectives"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"sink-all-gather", "hoist-shard"})
    summary: ClassVar[str] = "removes pairs of collectives that undo each other, and joins those that are one"
    axis: ClassVar[str | None] = "tp"

    def rewrites(self, gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        """Join one pair after the other."""
        for node in list(gm.graph.nodes):
            if not is_reshard(node, "tp") or not is_reshard(Reshard.of(node).x, "tp"):
                continue
            second = Reshard.of(node)
            first = Reshard.of(second.x)
            if is_view(first.x, "tp"):
                continue  # a part of it may be another part than the same state means elsewhere
            joined = _joined(first.x, first.src, second.src, second.dst, self.name)
            if joined is not None:
                node.replace_all_uses_with(joined)
                gm.graph.erase_node(node)
                _erase_unread(second.x)
                yield joined


def _erase_unread(node: fx.Node) -> None:
    """A change of state that nobody reads any more, and those in front of it."""
    while is_reshard(node) and not node.users:
        before = Reshard.of(node).x
        node.graph.erase_node(node)
        node = before


def _joined(value: fx.Node, src: str, middle: str, dst: str, origin: str) -> fx.Node | None:
    """What src -> middle -> dst amounts to; None if the pair must stay."""
    if middle != "I":
        return None
    if src == dst:
        return value
    if (src.startswith("S") and dst == "R") or (src == "P" and dst.startswith("S")):
        return reshard_to(value, "tp", src, dst, origin=origin)
    return None
