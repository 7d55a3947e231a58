"""Calls of a logger in a model: given while Dynamo traces, so that they do not end the graph.

A compiled call gives none. A text that is made of a tensor's values ends the graph all the same. Dynamo knows the
methods of a logger and refuses them; functions of module `logging` it does not look into.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from spcompile.torch_private import ConstantVariable, LoggingLoggerVariable

_GIVEN = frozenset({"debug", "info", "warning", "warn", "error", "critical", "fatal", "log"})
_ASKED = frozenset({"isEnabledFor", "getEffectiveLevel", "hasHandlers"})
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_of_dynamo = LoggingLoggerVariable.call_method


@functools.wraps(_of_dynamo)
def _called_now(self: Any, tx: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What Dynamo does with a method of a logger."""
    if name in _GIVEN | _ASKED and not tx.export:
        try:
            values = [x.as_python_constant() for x in args]
            named = {key: x.as_python_constant() for key, x in kwargs.items()}
        except NotImplementedError:
            return _of_dynamo(self, tx, name, args, kwargs)
        return ConstantVariable.create(getattr(self.value, name)(*values, **named))
    return _of_dynamo(self, tx, name, args, kwargs)


def _substituted(name: str) -> Callable[..., None]:
    level = _LEVELS[name]

    @torch.compiler.substitute_in_graph(getattr(logging, name), skip_signature_check=True)
    def give(message: Any, *args: Any, **kwargs: Any) -> None:
        _give_by_root(level, message, args)

    return give


@torch.compiler.assume_constant_result
def _give_by_root(level: int, message: Any, args: tuple[Any, ...]) -> None:
    logging.log(level, message, *args)


setattr(LoggingLoggerVariable, "call_method", _called_now)  # noqa: B010 (a method, for mypy)
SUBSTITUTES = [_substituted(name) for name in _LEVELS]
