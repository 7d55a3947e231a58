"""ATen ops by name, those that only give elements another shape, and the tensors that a call reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

RESHAPES = """
    _reshape_alias _unsafe_view flatten.using_ints ravel reshape reshape_as squeeze squeeze.dim squeeze.dims
    unflatten.int unsqueeze view view_as
"""
PERMUTES = """
    adjoint mT moveaxis.int moveaxis.intlist movedim.int movedim.intlist numpy_T permute swapaxes swapdims t
    transpose.int
"""
EXPANDS = """
    broadcast_to expand expand_as
"""


def overloads(names: str) -> list[Any]:
    """The ATen ops of a table of names: `"exp add.Tensor"` is aten.exp.default and aten.add.Tensor."""
    found = []
    for name in names.split():
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return found


def packet_of(node: fx.Node) -> Any:
    """The op of a call, whatever its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a call in argument order, lists flattened, SymInts and numbers left out."""
    found: list[fx.Node] = []

    def visit(arg: fx.Node) -> fx.Node:
        if isinstance(arg.meta.get("val"), torch.Tensor):
            found.append(arg)
        return arg

    fx.node.map_arg((node.args, node.kwargs), visit)
    return found
