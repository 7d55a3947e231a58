"""World size 1: nothing is sharded, but attention is recognised, so that no dense masks and scores are built."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from spcompile.attention.scores.attention_call import AttentionCall
from spcompile.graph.edit import argument, call
from spcompile.graph.typed_call import value_of
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes_api import Pass
from spcompile.program.build import LocalProgram, build
from spcompile.program.pipeline import History
from spcompile.recognition.eager import SOFTMAX

log = logging.getLogger(__name__)
aten = torch.ops.aten

RECOGNITION = ("recognize-softmax", "recognize-attention", "recognize-mask")
BEHIND_IT = ("share-tile-tables",)


def recognise(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    pipeline: Sequence[Pass],
    history: History,
    *,
    always: bool = False,
) -> LocalProgram | None:
    """The program of one device; None where it would hold as many dense masks and scores as the graph itself.

    always: also then, since memory is to be planned.

    Attention that one kernel of PyTorch computes as well goes back to it. Nothing is an error here: what cannot be
    captured is compiled as it is.
    """
    passes = [p for p in pipeline if p.name in RECOGNITION + BEHIND_IT]
    wishes = {name: wish for name, wish in options.passes.items() if name in RECOGNITION + BEHIND_IT}
    chosen = replace(options, passes=wishes, strict=False, outputs="full")
    try:
        program = build(gm, inputs, MeshShape(()), chosen, passes, history)
    except Exception as error:
        log.warning("SPR402 attention is not looked for, the graph cannot be captured: %s", error)
        return None
    if not always and _dense(program.gm) >= _dense(program.captured):
        return None
    _use_plain_kernels(program.gm)
    return program


def _dense(gm: fx.GraphModule) -> int:
    """How many calls hold scores or a mask of queries times keys."""
    count = 0
    for node in gm.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            count += argument(node, 3, "attn_mask") is not None
        elif AttentionCall.is_call(node):
            count += AttentionCall.of(node).bias is not None
        else:
            count += node.target in (*SOFTMAX, aten.exp.default)  # of a softmax by hand
    return count


def _use_plain_kernels(gm: fx.GraphModule) -> None:
    for node in AttentionCall.all_in(gm.graph):
        if not _is_plain(node):
            continue
        attention = AttentionCall.of(node)
        qkv = (attention.q, attention.k, attention.v)
        options = {"is_causal": attention.mask == "causal", "scale": attention.scale, "enable_gqa": True}
        new = call(gm.graph, aten.scaled_dot_product_attention.default, qkv, options, like=node)
        for user in list(node.users):
            user.replace_all_uses_with(new)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    gm.recompile()


def _is_plain(node: fx.Node) -> bool:
    """Whether scaled_dot_product_attention computes it in one kernel without a mask; on CPUs not with shared keys."""
    attention = AttentionCall.of(node)
    sizes = attention.sizes
    heads_fit = sizes.heads == sizes.kv_heads or value_of(attention.q).device.type != "cpu"
    plain = AttentionCall(q=attention.q, k=attention.k, v=attention.v, mask=attention.mask, scale=attention.scale)
    reads_lse = any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users)
    return attention == plain and plain.mask in ("full", "causal") and heads_fit and not reads_lse
