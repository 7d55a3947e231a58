"""spx.add_gradient: its operand; in the backward, something more is added to the operand's gradient.

It is how a graph says what no derivative gives: an auxiliary loss that reaches its inputs whatever the loss itself is.
Before autograd alone: behind it, the op is its operand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

_LIBRARY = torch.library.Library("spx", "FRAGMENT")
_LIBRARY.define(
    "add_gradient(Tensor x, Tensor gradient, bool nothing_else) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def add_gradient(x: Tensor, gradient: Tensor, *, nothing_else: bool) -> Tensor:
    """`x`, to whose gradient `gradient` is added, of its shape. nothing_else: no other part of that gradient counts."""
    return torch.ops.spx.add_gradient(x, gradient.to(x.dtype), nothing_else)


def erase_added_gradients(graph: fx.Graph) -> int:
    """Replace every `add_gradient` of a joint graph by its operand; returns how many."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.spx.add_gradient.default)
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return len(nodes)


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
