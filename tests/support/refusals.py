"""Calls that end in an error of spcompile: what it says, on which model and inputs."""

from __future__ import annotations

from collections.abc import Callable
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
