"""Ops with which a graph says what no derivative gives. Before autograd alone: behind it, each is one of its operands.

spx.add_gradient: its first operand; in the backward, something more is added to the gradient of that operand. An
auxiliary loss reaches its inputs so, whatever the loss itself is.
spx.keep_gradient: its second operand, whose gradient goes to the first: new numbers of a tensor, see `quiet_writes`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_LIBRARY.define("keep_gradient(Tensor old, Tensor new) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "add_gradient(Tensor x, Tensor gradient, bool nothing_else) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def add_gradient(x: Tensor, gradient: Tensor, *, nothing_else: bool) -> Tensor:
    """`x`, to whose gradient `gradient` is added, of its shape. nothing_else: no other part of that gradient counts."""
    return torch.ops.spx.add_gradient(x, gradient.to(x.dtype), nothing_else)


def keep_gradient(old: Tensor, new: Tensor) -> Tensor:
    """`new`, of the shape and dtype of `old`, to which the gradient goes."""
    return torch.ops.spx.keep_gradient(old, new)


def erase_gradient_ops(graph: fx.Graph) -> int:
    """Replace every such op of a joint graph by the operand that it is; returns how many."""
    erased = 0
    for target, operand in ((torch.ops.spx.add_gradient.default, 0), (torch.ops.spx.keep_gradient.default, 1)):
        for node in graph.find_nodes(op="call_function", target=target):
            node.replace_all_uses_with(node.args[operand])
            graph.erase_node(node)
            erased += 1
    return erased


def _copied(x: Tensor, gradient: Tensor, nothing_else: bool) -> Tensor:
    return x.clone()


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    _, gradient, ctx.nothing_else = inputs
    ctx.save_for_backward(gradient)


def _with_more(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (gradient,) = ctx.saved_tensors
    return gradient.clone() if ctx.nothing_else else grad + gradient, None, None


_LIBRARY.impl("add_gradient", _copied, "CompositeExplicitAutograd")
torch.library.register_fake("spx::add_gradient", lambda x, gradient, nothing_else: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_autograd("spx::add_gradient", _with_more, setup_context=_keep_gradient, lib=_LIBRARY)
_LIBRARY.impl("keep_gradient", lambda old, new: new.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("spx::keep_gradient", lambda old, new: torch.empty_like(new), lib=_LIBRARY)
torch.library.register_autograd("spx::keep_gradient", lambda ctx, grad: (grad, None), lib=_LIBRARY)
