"""What ranks are told where something is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def same_text(texts: list[str]) -> str:
    assert len(set(texts)) == 1, texts
    return texts[0]
