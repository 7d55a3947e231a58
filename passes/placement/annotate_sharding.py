"""annotate-*-parallel: find what an axis splits, and place every value.

Before: a graph that knows what it computes but not where. After: every node carries its index spaces and, where what
the axis splits reaches it, the factor over which it can run sharded.

    dp   the entries of the batch, from the inputs of which every rank passes its own
    cp   the sequence, from the query rows of every attention
    tp   heads, hidden features and the vocabulary, from the weights; the activations between blocks are not split yet
         (split-all-reduce and its neighbours see to that)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.graph.sizes import hint
from spcompile.passes_api import AxisPass, Context, Example, OnAxis, Stage
from spcompile.sharding.batch_entries import inputs_with_batch, require_batch
from spcompile.sharding.exchanges import alone_in_exchanges, exchange
from spcompile.sharding.group_ends import count_apart
from spcompile.sharding.group_totals import fold_totals
from spcompile.sharding.index_spaces import IndexSpaces, find_index_spaces, prefixes_of_their_own
from spcompile.sharding.layout import annotate
from spcompile.sharding.mixed_rows import mixed_row_seeds
from spcompile.sharding.propagate import Choice, Placements, propagate
from spcompile.sharding.rules.rule import OpRule, tensor_results
from spcompile.sharding.sequences import SCORES, sequence_families, sequence_seeds
from spcompile.sharding.sharded_or_replicated import trained_values
from spcompile.sharding.shuffles import find_shuffles, split_apart
from spcompile.sharding.spaces import Space
from spcompile.sharding.tensor_parallel import tensor_seeds


@dataclass(frozen=True)
class AnnotateSharding(AxisPass):
    """Attach a NodeLayout to every node."""

    stage: ClassVar[Stage] = Stage.GLOBAL
    on: ClassVar[Mapping[str, OnAxis]] = {
        "dp": OnAxis(
            "annotate-data-parallel",
            frozenset({"recognize-attention", "recognize-mask", "recognize-loss"}),
            "places the entries of the batch, of which each rank of dp has its own",
        ),
        "cp": OnAxis(
            "annotate-context-parallel",
            frozenset({"recognize-attention", "recognize-mask"}),
            "finds the sequence and places every value, from the factor rules",
        ),
        "tp": OnAxis(
            "annotate-tensor-parallel",
            frozenset({"lower", "split-projections"}),
            "decides from the graph which weights are column-, row- and vocabulary-parallel",
        ),
    }

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Annotate; all that is rewritten are counts of experts that groups of rows share with something else.

        Raises:
            BatchNotSplit: entries that cannot be told from something else.
        """
        place = {"dp": _place_batch, "cp": _place_sequence, "tp": _place_weights}[self.axis]
        is_split = self.axis != "tp" and ctx.mesh.size(self.axis) > 1
        rewrites = fold_totals(gm.graph) + (count_apart(gm.graph) if is_split else 0)
        shuffles = find_shuffles(gm.graph) if self.axis != "tp" else []
        alone: Mapping[fx.Node, OpRule] = {}
        while True:
            rules = {**alone, **{node: rule for shuffle in shuffles for node, rule in shuffle.rules.items()}}
            spaces = self._spaces(gm.graph, rules, ctx)
            placements = place(gm.graph, spaces, ctx)
            whole = split_apart(shuffles, spaces, placements)
            shuffles = [shuffle for shuffle in shuffles if shuffle not in whole]
            picked = {node for shuffle in shuffles for node in shuffle.members}
            degree = ctx.mesh.size(self.axis)
            exchanges = exchange(gm.graph, spaces, placements, degree, picked) if self.axis == "cp" else []
            cut = not alone and alone_in_exchanges(gm.graph, exchanges, spaces)
            if not whole and not cut:
                break
            alone = cut or alone
        placements.forced = picked
        annotate(gm.graph, self.axis, spaces, placements)
        for each in exchanges:
            text = f"{each.node.target} mixes positions of the sequence: a dim of {each.size} is split meanwhile"
            ctx.remarks.add("SPR108", text, each.node, strict_error=False)
        return rewrites

    def _spaces(self, graph: fx.Graph, rules: Mapping[fx.Node, OpRule], ctx: Context) -> IndexSpaces:
        kind = {"dp": "apart", "cp": "moving", "tp": "convolving"}[self.axis]
        zigzag = self.axis == "cp" and ctx.order == "zigzag"
        spaces = find_index_spaces(graph, zigzag=zigzag, rules=rules, **{kind: True})
        own = prefixes_of_their_own(spaces, sequence_families(spaces.calls)) if self.axis == "cp" else {}
        return find_index_spaces(graph, moving=True, zigzag=zigzag, rules={**own, **rules}) if own else spaces


def _place_batch(graph: fx.Graph, spaces: IndexSpaces, ctx: Context) -> Placements:
    found = propagate(spaces, {}, inputs_with_batch(graph))
    if ctx.mesh.size("dp") > 1:
        require_batch(graph, spaces, found, ctx.mesh.size("dp"))
    return found


def _place_sequence(graph: fx.Graph, spaces: IndexSpaces, ctx: Context) -> Placements:
    seeds = sequence_seeds(spaces, _batch_entries(graph, spaces), ctx.mesh.size("cp"))
    if _is_decoding(graph, spaces, seeds):
        seeds = {}
    if not seeds:
        seeds = _mixed_rows(graph, spaces, ctx)
    for node in (n for n in seeds if SCORES in n.meta.get("custom", {})):
        text = "attention: what reads the weights is no product with values; split by query rows"
        ctx.remarks.add("SPR202", text, node)
    return propagate(spaces, seeds if ctx.mesh.size("cp") > 1 else {})


def _batch_entries(graph: fx.Graph, spaces: IndexSpaces) -> set[Space]:
    """What the first dims of the user's inputs run over first: entries of the batch, where those have more dims."""
    inputs = (n for n in graph.find_nodes(op="placeholder") if n in spaces.values and not n.meta.get("state"))
    dims = (spaces.dims(n) for n in inputs if tensor_results(n)[0].ndim > 1)
    return {of_first[0] for of_first, *_ in dims if of_first}


def _is_decoding(graph: fx.Graph, spaces: IndexSpaces, seeds: Mapping[fx.Node, Choice]) -> bool:
    """Whether one token at a time sees keys of a cache, which is whole: all queries have length 1, none a gradient."""
    if any("s" in spaces.calls[n].rule.sizes or not spaces.calls[n].rule.paired for n in seeds):
        return False
    return trained_values(graph).isdisjoint(seeds)


def _mixed_rows(graph: fx.Graph, spaces: IndexSpaces, ctx: Context) -> dict[fx.Node, Choice]:
    """The seeds of a model without attention over a sequence."""
    attention = next(iter(graph.find_nodes(op="call_function", target=torch.ops.spx.attention.default)), None)
    if attention is not None:
        ctx.remarks.add("SPR301", "every query has length 1; the graph runs replicated", attention, strict_error=False)
        return {}
    seeds = mixed_row_seeds(graph, spaces)
    for node in seeds if ctx.mesh.size("cp") > 1 else ():
        ctx.remarks.add(
            "SPR109", "no attention: rows of this product, which others mix, are split", node, strict_error=False
        )
    if not seeds:
        ctx.remarks.add("SPR101", "neither attention nor rows that are mixed were found; the graph runs replicated")
    return seeds


def _place_weights(graph: fx.Graph, spaces: IndexSpaces, ctx: Context) -> Placements:
    degree = ctx.mesh.size("tp")
    found = tensor_seeds(graph, spaces, degree)
    for space in found.sequences:
        space.is_sequence = True
    placements = propagate(spaces, found.seeds)
    for node, call in spaces.calls.items():
        groups = hint(call.rule.sizes.get("g", 1)) if call.rule.paired else degree
        if groups % degree:
            heads = groups * hint(call.rule.sizes.get("r", 1))
            text = f"{heads} heads in {groups} groups over tp = {degree}"
            ctx.remarks.add("SPR503", text, node, strict_error=False)
    for node in found.kept:
        ctx.remarks.add("SPR502", f"the weight of {node.target} is not split over tp", node, strict_error=False)
    return placements


def _attention_over_flat_tokens(x_BSD: Tensor, w_DD: Tensor) -> Tensor:
    B, S, D = x_BSD.shape
    h_RD = x_BSD.reshape(B * S, D) @ w_DD
    h_B1SD = h_RD.reshape(B, 1, S, D)
    y_B1SD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD)
    return y_B1SD.squeeze(1) + x_BSD


def attention_and_loss(x_BSD: Tensor, w_DD: Tensor, labels_BS: Tensor) -> Tensor:
    """The EXAMPLE of passes that want all kinds of dims: batch, sequence, and both in one."""
    h_B1SD = (x_BSD @ w_DD).unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD, is_causal=True).squeeze(1)
    return torch.nn.functional.cross_entropy(y_BSD[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def _mlp(x_BSD: Tensor, up_DF: Tensor, down_FD: Tensor) -> Tensor:
    h_B1SD = x_BSD.unsqueeze(1)
    y_BSD = torch.nn.functional.scaled_dot_product_attention(h_B1SD, h_B1SD, h_B1SD).squeeze(1)
    n_BSD = torch.nn.functional.layer_norm(y_BSD, (y_BSD.shape[-1],))
    return x_BSD + torch.nn.functional.gelu(n_BSD @ up_DF) @ down_FD


def _of_shapes(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def _batch() -> tuple[Tensor, ...]:
    return torch.randn(28, 7, 4, dtype=torch.float64), *_of_shapes((4, 4)), torch.randint(0, 4, (28, 7))


LOSS_OF_ENTRIES = Example(attention_and_loss, _batch, mesh=(("dp", 2),))
MLP = Example(_mlp, lambda: _of_shapes((2, 7, 4), (4, 6), (6, 4)), mesh=(("tp", 2),))
EXAMPLE = {
    "dp": LOSS_OF_ENTRIES,
    "cp": Example(_attention_over_flat_tokens, lambda: _of_shapes((2, 7, 4), (4, 4))),
    "tp": MLP,
}
