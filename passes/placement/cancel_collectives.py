"""cancel-collectives: two changes of state that undo each other, or are one, become none, or one.

S -> I -> S    the same place: nothing
S -> I -> R    S -> R: the gradient, a sum in parts, is reduce-scattered instead of reduced and then cut
P -> I -> S    P -> S: a ReduceScatter
S -> I -> S'   S -> S': an AllToAll, if nobody reads the whole
x -> S -> y    x -> y, if nobody else reads the middle
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
        """Join one pair after the other, until no two that stand together are one."""
        is_joined = True
        while is_joined:
            is_joined = False
            for node in list(gm.graph.nodes):
                joined = _joined_with_its_operand(node, self.name)
                if joined is not None:
                    second = Reshard.of(node).x
                    if node < joined:  # one that was there, for a later reader
                        node.prepend(joined)
                    node.replace_all_uses_with(joined)
                    gm.graph.erase_node(node)
                    _erase_unread(second)
                    is_joined = True
                    yield joined


def _erase_unread(node: fx.Node) -> None:
    """A change of state that nobody reads any more, and those in front of it."""
    while is_reshard(node) and not node.users:
        before = Reshard.of(node).x
        node.graph.erase_node(node)
        node = before


def _joined_with_its_operand(node: fx.Node, origin: str) -> fx.Node | None:
    """What a change of state and the one in front of it amount to; None if there are no two, or both must stay."""
    if not is_reshard(node, "tp") or not is_reshard(Reshard.of(node).x, "tp"):
        return None
    second = Reshard.of(node)
    first = Reshard.of(second.x)
    if is_view(first.x, "tp"):
        return None  # a part of it may be another part than the same state means elsewhere
    readers = [Reshard.of(user).dst if is_reshard(user) else None for user in second.x.users]
    kinds = f"{first.src[0]}{first.dst[0]}{second.dst[0]}"
    if first.src == second.dst and kinds in ("SIS", "SSS"):
        return first.x
    is_one = (
        kinds in ("SIR", "PIS")
        or (kinds == "SIS" and all(state not in ("I", None) for state in readers))
        or (kinds in ("PSS", "SSS", "SSI", "SSR") and len(readers) == 1)
    )
    return reshard_to(first.x, "tp", first.src, second.dst, origin=origin) if is_one else None
