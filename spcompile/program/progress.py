"""How far a compile has come, for who shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Show = Callable[[str], None]

_shown: ContextVar[Show | None] = ContextVar("spcompile_progress", default=None)


@contextlib.contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Inside of this `show` is called with what begins, in a few words."""
    token = _shown.set(show)
    try:
        yield
    finally:
        _shown.reset(token)


def begins(what: str) -> None:
    """Say what a compile does next."""
    show = _shown.get()
    if show is not None:
        show(what)
