"""torch.autograd.Function in a graph: opened, so that its parts can be sharded, with the gradient that it defines.

Where the gradient of input x is grad * D for some D that does not depend on grad, the function f is

    f(x).detach() + (x - x.detach()) * D

in value, the second term being 0, and in gradient. Any other backward cannot be written in a forward graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from spcompile.capture.autocast import autocast_off
from spcompile.diagnostics import CaptureFailed

_PRODUCTS = {operator.mul, torch.mul, "mul", "__mul__", "__rmul__"}
_QUOTIENTS = {operator.truediv, torch.div, "div", "__truediv__"}
_SUMS = {operator.add, operator.sub, torch.add, torch.sub, "add", "sub"}
_SAME = {operator.neg, torch.neg, "neg", "contiguous", "clone"}


def with_own_gradient(
    inputs: Sequence[Any], outputs: Sequence[Any], saved: Sequence[Any], backward: fx.GraphModule
) -> tuple[Any, ...]:
    """The outputs of a function, with the gradients that its `backward` (of Dynamo's autograd_function_apply) defines.

    Raises:
        CaptureFailed: they are not the output's gradient times something.
    """
    if not torch.is_grad_enabled():  # a trace does not know which values need a gradient
        return tuple(outputs)
    legal = "a backward of the form grad * D, or the same computed without torch.autograd.Function"
    if len(outputs) != 1 or not _is_a_factor(backward):
        raise CaptureFailed("a torch.autograd.Function whose gradient cannot be sharded", legal=legal)
    (y,) = outputs
    with torch.no_grad(), autocast_off():
        factors = fx.Interpreter(backward).run(torch.ones_like(y), *saved)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    factors = factors if isinstance(factors, tuple | list) else (factors,)
    result = y.detach()
    for x, factor in zip(tensors, factors, strict=True):
        if factor is None or not x.is_floating_point():
            continue
        if x.shape != y.shape:
            raise CaptureFailed("a torch.autograd.Function of operands of different shapes", legal=legal)
        term = (x - x.detach()) * factor.detach()
        result = result + (term if term.dtype == y.dtype else term.to(y.dtype))
    return (result,)


def _is_a_factor(backward: fx.GraphModule) -> bool:
    """Whether every gradient is the first input of `backward` times something, element by element."""
    given, *_ = (node for node in backward.graph.nodes if node.op == "placeholder")
    linear = {given}
    for node in backward.graph.nodes:
        read = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in linear]
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            return all(result is None or result in linear for result in results)
        if not read and not any(arg in linear for arg in node.all_input_nodes):
            continue
        others = [arg for arg in node.args if arg not in read]
        keeps = (
            (node.target in _PRODUCTS and len(read) == 1)
            or (node.target in _QUOTIENTS and read == [node.args[0]] and len(others) == 1)
            or (node.target in _SUMS and len(read) == 2)
            or (node.target in _SAME and len(read) == 1 and not others)
        )
        if not keeps or node.kwargs or _shape_of(node) != _shape_of(given):
            return False
        linear.add(node)
    return False


def _shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else None
