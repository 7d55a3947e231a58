"""A look at what is compiled, for tests and benchmarks: nothing is kept where nobody asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from spcompile.program.build import LocalProgram
from spcompile.program.emit import Emission

Programs = list[tuple[LocalProgram, Emission]]
_LOOKING: list[Programs] = []


@contextlib.contextmanager
def observed() -> Iterator[Programs]:
    """A list that gets every program of the backend that is compiled inside, in this process."""
    found: Programs = []
    _LOOKING.append(found)
    try:
        yield found
    finally:
        _LOOKING[:] = [other for other in _LOOKING if other is not found]


def announce(program: LocalProgram, emission: Emission) -> None:
    """Called by the backend for each program."""
    for found in _LOOKING:
        found.append((program, emission))
