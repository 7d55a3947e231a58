"""Reading a call: its op, its arguments by schema name, and what is statically known about sizes."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from spcompile.graph.sizes import same
from spcompile.graph.typed_call import named_arguments
from spcompile.sharding.rules.rule import Size


def arguments(node: fx.Node) -> dict[str, Any]:
    """`named_arguments` of a graph's call, with example values (fake tensors, SymInts) in place of nodes."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    return named_arguments(node.target, args, kwargs)


def at_least(a: Size, b: Size) -> bool:
    """Whether `a >= b` is known."""
    return bool(statically_known_true(a >= b))


def known_multiple(a: Size, b: Size) -> bool:
    """Whether `b` is known to be a multiple of `a`; never for a size that may be 0."""
    return not same(a, 0) and bool(statically_known_true(b % a == 0))
