"""sink-all-gather: an AllGather along the sequence moves below the op that reads it.

Before: op(reshard(x, tp, S, I), w). After: reshard(op(reshard(reshard(x, tp, S, I), tp, I, S), w), tp, S, I), where
cancel-collectives removes the inner pair. An op lets it pass if its factor rule lets the sequence pass: norms,
dropout, residual additions, casts, and products with weights that tp does not split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from spcompile.graph.edit import is_getitem, result_number
from spcompile.graph.reshard import Place, Reshard, is_reshard, parse_place
from spcompile.passes.placement.annotate_sharding import MLP
from spcompile.passes_api import Context, RewritePass, Stage
from spcompile.sharding.global_view import is_view
from spcompile.sharding.layout import layout_of, show
from spcompile.sharding.propagate import Choice, choice_as_operand, leaves_sums
from spcompile.sharding.resharding import hand_over, reshards_of, run_sharded

EXAMPLE = MLP


@dataclass(frozen=True)
class SinkAllGather(RewritePass):
    """Let AllGathers of `tp` pass every op that the sequence passes."""

    name: ClassVar[str] = "sink-all-gather"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"split-all-reduce"})
    summary: ClassVar[str] = "moves AllGathers below norms, dropout, residual additions and casts"
    axis: ClassVar[str | None] = "tp"

    def rewrites(self, gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        """Pass one op after the other."""
        yield from _sink(reshards_of(gm.graph, "tp", "S", "I"), self.name)


def sink_all(gather: fx.Node, origin: str) -> list[fx.Node]:
    """Let one AllGather pass whatever it can; returns what it has passed."""
    return list(_sink([gather], origin))


def _sink(gathers: Iterable[fx.Node], origin: str) -> Iterator[fx.Node]:
    waiting = deque(gathers)
    while waiting:
        gather = waiting.popleft()
        for user in list(gather.users):
            choice = passes_below(user, gather)
            if choice is not None:
                waiting.extend(sink_through(user, choice, origin))
                yield user


def passes_below(user: fx.Node, gather: fx.Node) -> Choice | None:
    """The choice under which `user` runs on the parts that `gather` joins; None if it cannot, or runs split already."""
    change = Reshard.of(gather)
    place = parse_place(change.src)
    return None if place is None or is_view(change.x, "tp") else passes_at(user, gather, place)


def passes_at(user: fx.Node, value: fx.Node, place: Place) -> Choice | None:
    """The choice under which `user`, which reads `value` whole, runs on the parts at `place` of it."""
    layout = layout_of(user)
    if user.op != "call_function" or is_reshard(user) or is_getitem(user):
        return None
    if layout is None or layout.call is None or layout.call.rule.paired:
        return None
    if "tp" in layout.choice or "tp" in layout.partial:
        return None
    choice = choice_as_operand(user, value, layout.call, place)
    return None if choice is None or choice.factor in layout.call.rule.completed - layout.call.rule.filled else choice


def sink_through(user: fx.Node, choice: Choice, origin: str) -> list[fx.Node]:
    """Run `user` on parts; returns the new AllGathers of its results."""
    run_sharded(user, "tp", choice, origin=origin)
    layout = layout_of(user)
    assert layout is not None
    assert layout.call is not None
    if leaves_sums(layout.call, choice):
        hand_over(user, "tp", "P", origin=origin)
        return []
    gathers = []
    for value in [user, *(n for n in user.users if is_getitem(n))]:
        number = result_number(value) if value is not user else 0
        place = layout.place("tp", number)
        if place is None or (value is user and isinstance(user.meta["val"], (tuple, list))):
            continue
        if value is not user:
            value_layout = layout_of(value)
            assert value_layout is not None
            value_layout.places["tp"] = {0: place}
        show(value, "tp", str(place))
        if value.users:
            gathers.append(hand_over(value, "tp", str(place), origin=origin))
    return gathers
