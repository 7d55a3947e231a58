"""Lengths for which Dynamo has a symbol, and which a trace turned into a number after all.

A short length leaves one row on a rank, and torch asks whether a size is 1. The answer ties the symbol to its number
in the middle of a trace, which then fails. Dynamo traces once more, with that length a number from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spcompile.capture.retrace import fake_inputs
from spcompile.torch_private import RestartAnalysis, TracingContext, trace_again


@contextlib.contextmanager
def numbers_where_specialised(inputs: Sequence[Any]) -> Iterator[None]:
    """Where the block fails and sizes of `inputs` have become numbers in it, Dynamo traces again with those.

    Raises:
        RestartAnalysis: instead of what the block raised.
    """
    symbols = list(_symbols(inputs))
    try:
        yield
    except RestartAnalysis:
        raise
    except Exception:
        fixed = [(x, dim) for x, dim, size in symbols if size.node.maybe_as_int() is not None]
        if not fixed:
            raise
        for x, dim in fixed:  # as torch._dynamo.mark_static, which does something else while Dynamo compiles
            x.__dict__.setdefault("_dynamo_static_indices", set()).add(dim)
        trace_again("a length is a number")


def _symbols(inputs: Sequence[Any]) -> Iterator[tuple[Tensor, int, torch.SymInt]]:
    """The dims of the caller's tensors that are symbols now."""
    context = TracingContext.try_get()
    for x, fake in zip(inputs, fake_inputs(inputs)[1], strict=True):
        if context is not None and isinstance(x, Tensor) and x in context.tensor_to_context:
            sizes = [(dim, size) for dim, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)]
            yield from ((x, dim, size) for dim, size in sizes if size.node.maybe_as_int() is None)
