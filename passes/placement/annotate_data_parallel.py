"""annotate-data-parallel: find the batch, of which every rank of `dp` passes its own part.

Before: the program of one rank on its own rows. After: every value that has rows of the batch is split over `dp`, and
everything that sums over rows leaves a part of a sum. Shapes stay: they are one rank's already. But one row has no dim
that could be followed: then several rows stand for it until `dp` is lowered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.diagnostics import BatchNotSplit
from spcompile.graph.edit import shape_of
from spcompile.graph.reshard import Place
from spcompile.graph.sizes import same
from spcompile.passes_api import Context, Example, Pass, Stage
from spcompile.sharding.index_spaces import IndexSpaces, OpSpaces, find_index_spaces
from spcompile.sharding.layout import annotate
from spcompile.sharding.one_row import OWN, is_users, with_rows
from spcompile.sharding.propagate import SCORES, UNREAD_ATTENTION, Choice, Placements, propagate
from spcompile.sharding.row_blocks import write_blocks, write_blocks_of_one_row
from spcompile.sharding.row_counts import all_counts_are_known, count_all_rows, require_equal_rows, require_no_counts
from spcompile.sharding.row_evidence import require_rows
from spcompile.sharding.row_reads import require_unread_rows
from spcompile.sharding.spaces import Space, leaves


@dataclass(frozen=True)
class AnnotateDataParallel(Pass):
    """Attach a NodeLayout to every node; axis `dp` spreads from the batch of every attention and from the inputs."""

    name: ClassVar[str] = "annotate-data-parallel"
    stage: ClassVar[Stage] = Stage.GLOBAL
    after: ClassVar[frozenset[str]] = frozenset({"recognize-attention", "recognize-mask", "recognize-loss"})
    summary: ClassVar[str] = "finds the rows of the batch, of which each rank of dp has its own"
    axis: ClassVar[str | None] = "dp"

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Annotate; where there is one row a rank, the graph gets several first.

        Returns how many inputs have them, and how many joins and cuts of rows, and counts of rows, were rewritten.

        Raises:
            BatchNotSplit: no attention over rows of the batch, or rows that cannot be told from something else.
        """
        blocks = write_blocks(gm.graph, [n for n in gm.graph.find_nodes(op="placeholder") if is_users(n)])
        found, widened = _spread(gm.graph), 0
        if found is None:
            blocks += write_blocks_of_one_row(gm.graph)
            gm.graph, ctx.rows = with_rows(gm.graph)
            found = _spread(gm.graph)
            widened = sum(OWN in n.meta for n in gm.graph.find_nodes(op="placeholder"))
        if found is None:
            raise BatchNotSplit("no attention over a batch was found", legal="DDP over dp")
        spaces, seeds, placements = found
        if ctx.rows is not None:
            require_rows(gm.graph, spaces, placements, seeds, ctx.rows)
        require_equal_rows(gm.graph, spaces, placements)
        require_unread_rows(gm.graph, placements)
        counts = count_all_rows(gm.graph, placements)
        if counts is None:
            ctx.remarks.add("SPR104", "a number that the model computed from its number of rows counts one rank's")
        if counts is None or not all_counts_are_known(gm.graph):
            require_no_counts(gm.graph, spaces, placements, ctx.rows)
        for node in gm.graph.find_nodes(op="placeholder"):
            if node.meta.get("trainable") and (node, 0) in placements.places:
                raise BatchNotSplit(f"{node.name} requires a gradient and has rows of the batch", legal="DDP over dp")
        annotate(gm.graph, "dp", spaces, placements)
        return blocks + widened + (counts or 0)


def _spread(graph: fx.Graph) -> tuple[IndexSpaces, dict[fx.Node, Choice], Placements] | None:
    """Spaces, every attention over several rows, and all that has rows with it; None where no input has.

    Inputs that attention does not reach have rows where they are as long as the batch. Without a batch, an attention in
    three dims has its heads where a batch would be, and no input has rows. Where no attention is known the first dim of
    the inputs has rows: whatever mixes them is refused.
    """
    spaces = find_index_spaces(graph)
    inputs = [n for n in graph.find_nodes(op="placeholder") if is_users(n) and n in spaces.values]
    given = {leaf for n in inputs for dim in spaces.values[n][0] for leaf in leaves(dim)}
    batches = {n: factor for n, call in spaces.calls.items() if (factor := _batch_of(n, call, given)) is not None}
    seeds = {node: _rows_of(spaces.calls[node], factor, given) for node, factor in batches.items()}
    of_attention = propagate(graph, spaces, seeds)
    others = {n: at for n, at in _inputs_with_rows(spaces, seeds, inputs).items() if (n, 0) not in of_attention.places}
    placements = propagate(graph, spaces, seeds, others) if others else of_attention
    return (spaces, seeds, placements) if any((n, 0) in placements.places for n in inputs) else None


def _batch_of(node: fx.Node, call: OpSpaces, given: set[Space]) -> str | None:
    """The factor of an attention's batch; of a written-out one's, the first of four dims, if an input has it."""
    if call.rule.paired:
        return "b" if "b" in call.rule.sizes else None
    results, custom = call.rule.results[0], node.meta.get("custom", {})
    if (UNREAD_ATTENTION not in custom and SCORES not in custom) or len(results) != 4 or not results[0]:
        return None
    return results[0][0] if not given.isdisjoint(call.leaves_of(results[0][0])) else None


def _rows_of(call: OpSpaces, batch: str, given: set[Space]) -> Choice:
    """The part of an attention's batch that an input has: a model may repeat its rows, or put more than them there."""
    parts = call.leaves_of(batch)
    return Choice(batch, next((part for part, space in enumerate(parts) if space in given), 0))


def _inputs_with_rows(spaces: IndexSpaces, seeds: dict[fx.Node, Choice], inputs: list[fx.Node]) -> dict[fx.Node, Place]:
    """The user's tensors that are as long as the batch: that of an attention or, without one, of the first tensor."""
    tensors = [n for n in inputs if shape_of(n)]
    rows = next((spaces.calls[n].rule.sizes[choice.factor] for n, choice in seeds.items()), None)
    rows = shape_of(tensors[0])[0] if rows is None and tensors else rows
    return {n: Place(0) for n in tensors if same(shape_of(n)[0], rows) and not same(rows, 1)}


def _loss_of_rows(x_BSD: Tensor, w_DD: Tensor, labels_BS: Tensor) -> Tensor:
    h_B1SD = (x_BSD @ w_DD).unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1)
    return torch.nn.functional.cross_entropy(y_BSD[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def _inputs() -> tuple[Tensor, ...]:
    w_DD = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    return torch.randn(2, 7, 4, dtype=torch.float64), w_DD, torch.randint(0, 4, (2, 7))


EXAMPLE = Example(_loss_of_rows, _inputs, mesh=(("dp", 2),))
