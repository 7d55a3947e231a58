"""Python floats that Dynamo took for symbols, as `dynamic=True` makes it do: an input of one number, read by `item()`.

A float of the model, such as a scale, becomes a number again: Dynamo traces once more and guards on it. So does a float
of the caller's, unless it only meets tensors in arithmetic. Then the input itself stands there, for any value.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from spcompile.capture.retrace import is_state
from spcompile.torch_private import TensorifyState, trace_again

_ARITHMETIC = {operator.mul, operator.add, operator.sub, operator.truediv, torch.mul, torch.add, torch.sub, torch.div}


def without_symbolic_floats(gm: fx.GraphModule, *, all_are_numbers: bool = False) -> None:
    """Let tensors or numbers stand where a graph of Dynamo's reads a float; `all_are_numbers`: only numbers.

    Raises:
        RestartAnalysis: a float is to be a number; Dynamo is to see it.
    """
    reads = [n for n in gm.graph.find_nodes(op="call_method", target="item") if _is_symbolic(n)]
    may_stay = [not is_state(n.args[0]) and all(_is_arithmetic(n, user) for user in n.users) for n in reads]
    asked = [n for n, stays in zip(reads, may_stay, strict=True) if all_are_numbers or not stays]
    if asked:
        for node in asked:
            TensorifyState.specialize(str(node.meta["example_value"].node._expr))
        trace_again("floats are numbers")
    for node in reads:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    if reads:
        gm.recompile()


def _is_symbolic(node: fx.Node) -> bool:
    source = node.args[0]
    is_float = isinstance(node.meta.get("example_value"), torch.SymFloat)
    return is_float and isinstance(source, fx.Node) and source.op == "placeholder"


def _is_arithmetic(number: fx.Node, user: fx.Node) -> bool:
    """Whether a float meets a floating tensor, whose dtype the result then has."""
    operands: tuple[Any, ...] = user.args
    others = [x for x in operands if isinstance(x, fx.Node) and x is not number]
    values = [x.meta.get("example_value") for x in others]
    if user.target not in _ARITHMETIC or len(operands) != 2 or user.kwargs or len(values) != 1:
        return False
    return isinstance(values[0], torch.Tensor) and values[0].ndim > 0 and values[0].is_floating_point()
