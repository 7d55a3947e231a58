"""Bytes that a call holds while it runs, besides operands and results."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch.fx as fx

from spcompile.attention.attention_scratch import attention_scratch
from spcompile.collectives.pipelined_matmuls import PIPELINED
from spcompile.collectives.typed_calls import AllGatherMatmulCall, MatmulReduceScatterCall
from spcompile.graph.sizes import Size, expression
from spcompile.graph.typed_call import value_of
from spcompile.losses.scratch import scratch_bytes
from spcompile.machine.accelerators import Accelerator


def bytes_inside(node: fx.Node, accelerator: Accelerator, of: Callable[[Size], Size] = expression) -> sympy.Expr:
    """Of a node, on an accelerator; 0 for what only computes its results.

    of: what a size counts as; `hint` for a number where sizes are symbols.
    """
    if node.target in PIPELINED:
        return _of_messages(node, of)
    return scratch_bytes(node, of) + attention_scratch(node, accelerator.fused_attention, of)


def _of_messages(node: fx.Node, of: Callable[[Size], Size]) -> sympy.Expr:
    """Products in chunks: the part that is multiplied, or added to, and the one that arrives."""
    if AllGatherMatmulCall.is_call(node):
        part = value_of(AllGatherMatmulCall.of(node).x)
    else:
        assert MatmulReduceScatterCall.is_call(node)
        part = node.meta["val"]
    return 2 * of(part.numel()) * part.element_size()
