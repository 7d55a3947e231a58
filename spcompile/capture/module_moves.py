"""What Dynamo makes of `module.to(device)` inside of a forward where everything is there already, and of old tensors.

A package that brings its experts to the device of their input writes `param.set_(param.to(device))` into the graph:
nothing, on the device of the parameter. `torch.Tensor([3])` stands there as a call of the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from spcompile.diagnostics import CaptureFailed, source_of


def set_to_itself(node: fx.Node) -> fx.Node | None:
    """The parameter that a call sets to what it is; None for any other call.

    Raises:
        CaptureFailed: something else is set.
    """
    if node.op != "call_function" or node.target is not torch.Tensor.set_:
        return None
    kept, new = node.args[:2]
    assert isinstance(kept, fx.Node)
    if isinstance(new, fx.Node) and new.op == "call_method" and new.target == "to" and new.args[0] is kept:
        before, after = (n.meta["example_value"] for n in (kept, new))
        if before.device == after.device and before.dtype == after.dtype:
            return kept
    raise CaptureFailed("the storage of a tensor is replaced in the forward", where=source_of(node))


def is_list_of_numbers(args: Sequence[Any]) -> bool:
    """Whether the class of tensors is called with the numbers of a vector, not with a size."""
    numbers = args[0] if len(args) == 1 else None
    return isinstance(numbers, list | tuple) and all(isinstance(x, int | float) for x in numbers)
