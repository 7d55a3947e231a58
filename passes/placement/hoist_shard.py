"""hoist-shard: a Shard along the sequence moves above the op that made its operand.

Before: reshard(op(x, w), tp, I, S). After: op(reshard(x, tp, I, S), w). The op runs on a part instead of the whole,
and what was an AllGather of its gradient is gone: the mirror image of sink-all-gather.

What else reads the result gets it by an AllGather, which moves down as in sink-all-gather: a first layer's norm, beside
the residual stream, runs on parts as the norms of all other layers do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.edit import is_getitem
from spcompile.graph.reshard import Place, Reshard, is_reshard, parse_place
from spcompile.passes.placement.sink_all_gather import sink_all
from spcompile.passes_api import Context, Example, RewritePass, Stage
from spcompile.sharding.layout import layout_of, show
from spcompile.sharding.propagate import Choice, choice_as_operand, choice_at, shards_results
from spcompile.sharding.resharding import reshard_to, reshards_of, run_sharded


@dataclass(frozen=True)
class HoistShard(RewritePass):
    """Let Shards of `tp` pass every op that the sequence passes, as it passes all that reads the op's result."""

    name: ClassVar[str] = "hoist-shard"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"sink-all-gather", "split-all-gather"})
    summary: ClassVar[str] = "moves Shards above position lookups, masks and casts"
    axis: ClassVar[str | None] = "tp"

    def rewrites(self, gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        """Pass one op after the other."""
        waiting = deque(reshards_of(gm.graph, "tp", "I", "S"))
        passed: set[fx.Node] = set()
        while waiting:
            shard = waiting.popleft()
            if shard in passed:
                continue  # it waited twice: from the start, and as an operand of what another one passed
            change = Reshard.of(shard)
            value = change.x
            choice = _passes(value, shard)
            if choice is None:
                continue
            run_sharded(value, "tp", choice, origin=self.name)
            show(value, "tp", change.dst)
            others = [user for user in value.users if user is not shard]
            shard.replace_all_uses_with(value)
            gm.graph.erase_node(shard)
            passed.add(shard)
            waiting.extend(_shards_read_by(value))
            if others:
                whole = reshard_to(value, "tp", change.dst, "I", origin=self.name)
                for user in others:
                    user.replace_input_with(value, whole)
                waiting.extend(shard for user in sink_all(whole, self.name) for shard in _shards_read_by(user))
            yield value


def _shards_read_by(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_reshard(n) and Reshard.of(n).kinds == ("I", "S")]


def _passes(value: fx.Node, shard: fx.Node) -> Choice | None:
    """The choice under which the maker of `value` gives the part that `shard` takes."""
    layout = layout_of(value)
    place = parse_place(Reshard.of(shard).dst)
    if value.op != "call_function" or is_reshard(value) or is_getitem(value):
        return None
    if any(user is not shard and not _reads_parts(user, value, place) for user in value.users):
        return None
    if layout is None or layout.call is None or place is None or "tp" in layout.choice or layout.call.rule.paired:
        return None
    return choice_at(layout.call.rule.results[0], layout.call, place)


def _reads_parts(user: fx.Node, value: fx.Node, place: Place | None) -> bool:
    """Whether what `user` makes of a value is split as well, or it wants the value for a product with split weights."""
    layout = layout_of(user)
    if is_reshard(user):
        return Reshard.of(user).dst == "R"
    if layout is None or layout.call is None or place is None or layout.call.rule.paired:
        return False
    if "tp" in layout.choice or "tp" in layout.partial:
        return False
    choice = choice_as_operand(user, value, layout.call, place)
    return choice is not None and shards_results(layout.call, choice)


def _mlp_with_positions(x_BSD: Tensor, table_TD: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    h_B1SD = x_BSD.unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).squeeze(1)
    places_SD = torch.nn.functional.embedding(torch.arange(x_BSD.shape[1]), table_TD)
    return places_SD.tanh() + torch.nn.functional.gelu(y_BSD @ up_DF) @ down_FD


def _inputs() -> tuple[Tensor, ...]:
    shapes = ((2, 7, 4), (9, 4), (4, 6), (6, 4))
    return tuple(torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)


EXAMPLE = Example(_mlp_with_positions, _inputs, mesh=(("tp", 2),))
