"""Lengths for which Dynamo has a symbol, and which a trace turned into a number after all.

A short length leaves one position on a rank, and torch asks whether a size is 1. The answer ties the symbol to its
number in the middle of a trace, which then fails. Dynamo traces once more, with that length a number from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spcompile.capture.retrace import fake_inputs
from spcompile.diagnostics import RanksDisagree, RanksMissing
from spcompile.torch_private import RestartAnalysis, TracingContext, trace_again

_STATIC = "_dynamo_static_indices"


@contextlib.contextmanager
def numbers_where_specialised(inputs: Sequence[Any]) -> Iterator[None]:
    """Where the block fails and sizes of `inputs` have become numbers in it, Dynamo traces again with those.

    Raises:
        RestartAnalysis: instead of what the block raised.
    """
    symbols = list(_symbolic_dims(inputs))
    try:
        yield
    except (RestartAnalysis, RanksDisagree, RanksMissing):
        raise
    except Exception:
        fixed = [(x, dim) for x, dim, size in symbols if size.node.maybe_as_int() is not None]
        new = [(x, dim) for x, dim in fixed if dim not in x.__dict__.get(_STATIC, ())]
        if not new:
            raise  # or the user wants a symbol there, come what may
        for x, dim in new:
            _make_number(x, dim)
        trace_again("a length is a number")


def _make_number(x: Tensor, dim: int) -> None:
    """As torch._dynamo.mark_static, which does something else while Dynamo compiles."""
    x.__dict__.setdefault(_STATIC, set()).add(dim)
    x.__dict__.get("_dynamo_weak_dynamic_indices", set()).discard(dim)  # of maybe_mark_dynamic


def _symbolic_dims(inputs: Sequence[Any]) -> Iterator[tuple[Tensor, int, torch.SymInt]]:
    """The dims of the caller's tensors that are symbols now."""
    context = TracingContext.try_get()
    for x, fake in zip(inputs, fake_inputs(inputs)[1], strict=True):
        if context is not None and isinstance(x, Tensor) and x in context.tensor_to_context:
            sizes = [(dim, size) for dim, size in enumerate(fake.shape) if isinstance(size, torch.SymInt)]
            yield from ((x, dim, size) for dim, size in sizes if size.node.maybe_as_int() is None)
