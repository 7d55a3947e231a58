"""Tensors that a model reads as Python lists, where their length depends on data.

Dynamo takes `.tolist()` and loops over a tensor element by element, so it needs the length. Where data tell it, as of
`x[mask]`, Dynamo raises an error that nothing catches; here that ends the graph, as it does without the settings that
`dynamo_settings` makes.

`bincount(ids, minlength=n)` has n counts unless a number is n or more, which it is not where n is the number of
experts. Read as a list it is taken to have n, and the compiled code checks that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from spcompile.torch_private import TensorVariable, unimplemented

_AS_LONG = frozenset({"to", "int", "long", "cpu", "numpy", "clone", "detach", "contiguous", "cumsum"})


def _with_known_length(of_dynamo: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo does with a tensor that is read as a list."""

    @functools.wraps(of_dynamo)
    def read(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        node = self.as_proxy().node
        tensor = node.meta.get("example_value")
        if isinstance(tensor, torch.Tensor) and tensor.ndim and free_unbacked_symbols(tensor.shape[0]):
            counts = _least_counts(node)
            if counts is None:
                unimplemented(
                    gb_type="a list of numbers whose length depends on data",
                    context=f"{self}",
                    explanation="Dynamo reads a tensor as a list only where it knows the length.",
                    hints=["Keep the numbers in a tensor."],
                )
            torch._check(tensor.shape[0] == counts, lambda: f"bincount found a number that is {counts} or more")
        return of_dynamo(self, tx, *args, **kwargs)

    return read


def _least_counts(node: fx.Node) -> int | None:
    """How many counts a value has at least, if it is of a `bincount`, cast or added up."""
    while _call_name(node) in _AS_LONG:
        node = node.args[0]  # type: ignore[assignment]
    if _call_name(node) != "bincount":
        return None
    given = dict(zip(("input", "weights", "minlength"), node.args, strict=False)) | node.kwargs
    counts = given.get("minlength")
    return counts if isinstance(counts, int) and counts > 0 and given.get("weights") is None else None


def _call_name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", None) if node.op == "call_function" else None


for name in ("method_tolist", "unpack_var_sequence"):
    setattr(TensorVariable, name, _with_known_length(getattr(TensorVariable, name)))
