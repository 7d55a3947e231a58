"""share-tile-tables: what data say about tiles of scores is found once for all layers, forward and backward.

Before   ring_attention(q, k, v, documents, documents, ..., 'causal documents', ...)               # in every layer
After    positions: "i32[4]" = spx.positions(7, 'cp', 2, 'zigzag')
         tile_tables: "i32[676]" = spx.tile_tables(positions, None, documents, documents, ...)      # once
         ring_attention(q, k, v, documents, documents, ..., 'causal documents', ..., tables=tile_tables)

A kernel skips tiles of scores that a mask empties and asks no mask in those that it fills. Of masks by positions that
is known for good. Documents and key padding are data: finding it takes dozens of small kernels for each hop. Attentions
of one mask, one layout and tiles of one size share what is found. So do those over positions that are data: with tables
nobody on the host has to read them. On CPUs no kernel asks, and nothing is inserted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.attention.kernels.table_op import MOST_HEAD, TileTablesCall
from spcompile.attention.kernels.triton.configs import variant_of
from spcompile.attention.ring.ring_call import RingCall
from spcompile.attention.scores.attention_call import Attention, AttentionCall
from spcompile.collectives.typed_calls import PositionsCall
from spcompile.graph.edit import call as new_call
from spcompile.graph.sizes import Size
from spcompile.graph.typed_call import value_of
from spcompile.passes_api import Context, Example, Pass, Stage

UNPADDED = 2**31 - 1  # no position is past it: rows that say where they are have no padding to be told apart
BYTES = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}  # of a number, by the dtypes that kernels take


@dataclass(frozen=True)
class ShareTileTables(Pass):
    """Give every attention whose mask is data, or whose positions are, the tables that kernels read.

    always: also where no kernel reads them, on CPUs and in float64.
    """

    name: ClassVar[str] = "share-tile-tables"
    stage: ClassVar[Stage] = Stage.LOCAL
    after: ClassVar[frozenset[str]] = frozenset({"parallelize-attention"})
    summary: ClassVar[str] = "finds once for all layers which tiles of scores documents and key padding leave"

    always: bool = False

    def run(self, gm: fx.GraphModule, ctx: Context) -> int:
        """Insert the tables; returns the number of attentions that read them."""
        made: dict[TileTablesCall | PositionsCall, fx.Node] = {}
        count = 0
        for node in list(gm.graph.nodes):
            if not (AttentionCall.is_call(node) or RingCall.is_call(node)):
                continue
            call = AttentionCall.of(node) if AttentionCall.is_call(node) else RingCall.of(node)
            if call.tables is None and _is_data(call) and (self.always or _has_kernel(call)):
                call.but(tables=_tables(call, node, made)).write(node)
                count += 1
        return count


def _is_data(call: AttentionCall | RingCall) -> bool:
    """Whether anything but the layout decides which tiles are left."""
    is_placed = isinstance(call, AttentionCall) and (call.q_positions is not None or call.k_positions is not None)
    return call.attention_mask.needs_data or is_placed


def _has_kernel(call: Attention) -> bool:
    """Whether a kernel may read tables: on a GPU, for all that is known before it runs."""
    q, sizes = value_of(call.q), call.sizes.hints()
    return q.device.type == "cuda" and q.dtype in BYTES and max(sizes.qk_size, sizes.v_size) <= MOST_HEAD


def _tables(
    call: AttentionCall | RingCall, node: fx.Node, made: dict[TileTablesCall | PositionsCall, fx.Node]
) -> fx.Node:
    """The tables of an attention, new ones or those of an attention before it."""
    sizes = call.sizes.hints()
    kind = {
        "element": BYTES.get(value_of(call.q).dtype, 4),
        "head_size": sizes.qk_size,
        "v_size": sizes.v_size,
        "variant": variant_of(call.scores()),
    }
    if isinstance(call, RingCall):
        layout = {"length": call.q_length, "axis": call.axis, "degree": call.degree, "order": call.order}
        device = value_of(call.q).device
        positions = _once(PositionsCall(**layout, inner=call.inner, device=device), node, made)
        wanted = call.into(TileTablesCall, q_positions=positions, k_positions=None, **kind)
    else:
        rows, keys = (_length(x, node) for x in (call.q, call.k))
        given = {"degree": 1, "order": "contiguous", "inner": 1}
        q_length = rows if call.q_positions is None else UNPADDED
        wanted = call.into(TileTablesCall, q_length=q_length, k_length=keys, **given, **kind)
    return _once(wanted, node, made)


def _length(x: fx.Node, node: fx.Node) -> Size:
    """Rows of q or keys, as an argument: a number, or a node."""
    length = value_of(x).shape[2]
    return length if isinstance(length, int) else new_call(node.graph, torch.ops.aten.sym_size.int, (x, 2), like=node)


def _once(
    wanted: TileTablesCall | PositionsCall, node: fx.Node, made: dict[TileTablesCall | PositionsCall, fx.Node]
) -> fx.Node:
    """A call in front of `node`, unless there is one; for forward and backward, also of a checkpointed region."""
    if wanted not in made:
        made[wanted] = wanted.insert(like=node)
        for mark in ("recompute", "ac_graph_id"):
            made[wanted].meta.pop(mark, None)
    return made[wanted]


def _packed_attention(q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, ids_BS: Tensor) -> Tensor:
    at_S = torch.arange(q_BNSH.shape[2])
    keep_B1SS = (ids_BS[:, None, :, None] == ids_BS[:, None, None, :]) & (at_S[:, None] >= at_S)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(attend(q_BNSH, k_BNSH, v_BNSH, keep_B1SS), k_BNSH, v_BNSH, keep_B1SS)


def _inputs() -> tuple[Tensor, ...]:
    qkv = (torch.randn(1, 4, 7, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return *qkv, torch.tensor([[0, 0, 0, 1, 1, 1, 1]])


EXAMPLE = Example(_packed_attention, _inputs, options={"attention": "ring"}, fields={"always": True})
