"""`warnings.warn` in a model: given while Dynamo traces, at the user's line, so that it does not end the graph.

A compiled call gives none. Python shows a warning once for each line by default, which stays so.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from spcompile.torch_private import TracingContext

_STANDARD = tuple(
    (category.__name__, category)
    for category in (
        *(UserWarning, Warning, DeprecationWarning, PendingDeprecationWarning, FutureWarning, RuntimeWarning),
        *(SyntaxWarning, ImportWarning, UnicodeWarning, BytesWarning, ResourceWarning),
    )
)


@torch.compiler.substitute_in_graph(warnings.warn, skip_signature_check=True)
def warn(
    message: Any, category: type[Warning] | None = None, stacklevel: int = 1, source: Any = None, **rest: Any
) -> None:
    """What Dynamo traces instead. A message that is made of a tensor's values ends the graph all the same."""
    if isinstance(message, Warning):
        category, message = type(message), message.args[0]
    module, name = _named(UserWarning if category is None else category)
    give_now(message, module, name, stacklevel)


def _named(category: type[Warning]) -> tuple[str, str]:
    for name, standard in _STANDARD:  # Dynamo does not know the names of built-in classes
        if category is standard:
            return "builtins", name
    return category.__module__, category.__qualname__


@torch.compiler.assume_constant_result
def give_now(message: str, module: str, name: str, stacklevel: int) -> None:
    """Give a warning of a category that is known by its name, as of the place in the user's code that is traced."""
    category = getattr(importlib.import_module(module), name, UserWarning)
    frames = TracingContext.extract_stack()[:-1]  # the last is `warn` above
    if not frames:
        warnings.warn(message, category, stacklevel=2)
        return
    frame = frames[-min(max(1, stacklevel), len(frames))]
    warnings.warn_explicit(message, category, frame.filename, frame.lineno or 1)
