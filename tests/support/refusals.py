"""Calls that end in an error of spcompile, or in warnings: what they say, on which model and inputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spcompile.diagnostics import SpcompileError


def refusal(call: Callable[[], Any]) -> str:
    """The text of the error of spcompile that `call` ends in, without what torch wraps around it."""
    try:
        call()
    except Exception as raised:
        found: BaseException | None = raised
        while found is not None and not isinstance(found, SpcompileError):
            found = getattr(found, "inner_exception", None) or found.__cause__
        if found is None:
            raise
        return str(found)
    raise AssertionError("nothing was refused")


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(backend="spcompile", options={"compiler": "eager", **options})
    return model


def ids(length: int = 16) -> Tensor:
    return torch.arange(2 * length).reshape(2, length) % 40


def same_text(texts: list[str]) -> str:
    assert len(set(texts)) == 1, texts
    return texts[0]


class Warnings(logging.Handler):
    """What is logged as a warning by the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def remarks() -> Iterator[list[str]]:
    handler, logger = Warnings(), logging.getLogger("spcompile.backend")
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
