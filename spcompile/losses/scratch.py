"""Bytes that the loss ops hold while they run, besides operands and results.

N rows, D width, C classes on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
import torch.fx as fx

from spcompile.graph.sizes import Size, expression
from spcompile.graph.typed_call import value_of
from spcompile.losses.linear_cross_entropy import wide
from spcompile.losses.linear_loss_call import LinearCrossEntropyBackwardCall, LinearCrossEntropyCall, LinearLoss
from spcompile.losses.row_chunks import symbolic_rows_of_chunk


def scratch_bytes(node: fx.Node, of: Callable[[Size], Size] = expression) -> sympy.Expr:
    """Of a node: a chunk of logits in its dtypes, and the sum of the weight's gradient; 0 for any other op.

    of: what a size counts as; `hint` for a number where sizes are symbols.
    """
    if LinearCrossEntropyCall.is_call(node):
        return _of_chunk(LinearCrossEntropyCall.of(node), of, is_backward=False)
    if LinearCrossEntropyBackwardCall.is_call(node):
        call = LinearCrossEntropyBackwardCall.of(node)
        weight = value_of(call.weight)
        is_rounded = call.weight_gradient and wide(weight.dtype) != weight.dtype
        sums = of(weight.numel()) * wide(weight.dtype).itemsize if is_rounded else 0
        return _of_chunk(call, of, is_backward=True) + sums
    return sympy.Integer(0)


def _of_chunk(call: LinearLoss, of: Callable[[Size], Size], is_backward: bool) -> sympy.Expr:
    """The product, the numbers that are exponentiated, what a softcap keeps, and the product's gradient."""
    N, D, C = map(of, call.sizes)
    product = value_of(call.x).dtype
    dtypes = [product, *_kept(call, product)] if is_backward else [product]
    last = wide(call.logit_steps.dtype_of(product))
    dtypes += [last] if last != product or len(dtypes) > 1 else []
    dtypes += [product] if is_backward and last != product else []
    return symbolic_rows_of_chunk(N, D, C) * C * sum(dtype.itemsize for dtype in dtypes)


def _kept(call: LinearLoss, dtype: torch.dtype) -> list[torch.dtype]:
    found = []
    for step in call.logit_steps.steps:
        dtype = step.dtype if step.op == "to" else dtype
        found += [dtype] if step.op == "tanh" else []
    return found
