"""Settings of Dynamo without which plain models break into several graphs.

Dynamo reads them before it calls a backend, and a frame that it gives up never reaches one. So they are set from
outside: some for the process, when the backend is looked up; those that would change what other backends get, only
around calls of models that this one compiles.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spcompile.capture import lists_of_numbers, user_logging, user_warnings  # noqa: F401  (tell Dynamo what to trace)
from spcompile.torch_private import detect_is_causal_mask

_TOLD = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops", "allow_rnn")


class _WithLibraryMethods(set[Callable[..., Any]]):
    """A set that also holds the methods that libraries have added to Logger by now.

    A library such as transformers may be imported after this; Dynamo asks while it traces.
    """

    def __contains__(self, method: object) -> bool:
        return super().__contains__(method) or method in added_by_libraries()

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter([*super().__iter__(), *added_by_libraries()])


@torch.compiler.substitute_in_graph(detect_is_causal_mask)
def causal_hint(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """What nn.TransformerEncoder and nn.TransformerDecoder pass on as the hint that their mask is causal.

    torch's own compares the mask's values where the caller gives no hint, and a branch on values ends the graph. The
    hint spares a layer the mask; without it the mask is applied as it is, so that the result is the same.
    """
    return is_causal is True


def ignore_library_logging() -> None:
    """Let Dynamo pass over logging methods that libraries add to Logger, such as transformers' `warning_once`.

    Dynamo knows the standard methods; an added one ends the graph in the middle of a model. Ignored means: not called
    in compiled code. Idempotent; called when the backend is looked up.
    """
    given = torch._dynamo.config.ignore_logging_functions
    if not isinstance(given, _WithLibraryMethods):
        torch._dynamo.config.ignore_logging_functions = _WithLibraryMethods(given)


@contextlib.contextmanager
def as_in_one_graph() -> Iterator[None]:
    """What Dynamo does only if it is told, so that a plain model is one graph.

    Numbers and sizes that depend on data become symbols, as under fullgraph=True: without it `.item()`, `nonzero` and
    `x[mask]` end the graph. Recurrent layers are calls of it.
    Around every call, so it must be cheap: `config.patch` makes a context variable each time, which Python keeps.
    """
    config = torch._dynamo.config
    before = {name: getattr(config, name) for name in _TOLD}
    for name in _TOLD:
        setattr(config, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def added_by_libraries() -> list[Callable[..., Any]]:
    """The methods of logging.Logger that the standard library did not define."""
    return [m for n, m in vars(logging.Logger).items() if callable(m) and _is_foreign(n, m)]


def _is_foreign(name: str, method: object) -> bool:
    return not name.startswith("_") and getattr(method, "__module__", "logging") != "logging"
