"""Settings of Dynamo without which plain models break into several graphs."""

from __future__ import annotations

import logging

import torch


def ignore_library_logging() -> None:
    """Let Dynamo pass over logging methods that libraries add to Logger, such as transformers' `warning_once`.

    Dynamo knows the standard methods; an added one ends the graph in the middle of a model. Ignored means: not called
    in compiled code. Idempotent; called when the backend is looked up.
    """
    added = {m for n, m in vars(logging.Logger).items() if callable(m) and _is_foreign(n, m)}
    torch._dynamo.config.ignore_logging_functions = {*torch._dynamo.config.ignore_logging_functions, *added}


def _is_foreign(name: str, method: object) -> bool:
    return not name.startswith("_") and getattr(method, "__module__", "logging") != "logging"
