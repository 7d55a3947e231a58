"""Python's garbage collector runs rarely while a compile makes what it keeps.

A compile makes millions of nodes, tuples and fake tensors that stay. The collector looks at all of them again whenever
their number has grown by a quarter: a fifth of the time of a deep model. What it would free meanwhile is small, since
nothing here holds a tensor's memory.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

YOUNG = 50_000  # new objects, less those that are gone, between two collections of the youngest

_lock = threading.Lock()
_compiles = 0
_before = (0, 0, 0)


@contextlib.contextmanager
def rare_collection() -> Iterator[None]:
    """Inside of this the youngest objects are collected less often. It nests, and several threads may enter it."""
    global _compiles, _before
    with _lock:
        if _compiles == 0:
            _before = gc.get_threshold()
            if 0 < _before[0] < YOUNG:  # 0: the user has turned it off
                gc.set_threshold(YOUNG, *_before[1:])
        _compiles += 1
    try:
        yield
    finally:
        with _lock:
            _compiles -= 1
            if _compiles == 0:
                gc.set_threshold(*_before)
