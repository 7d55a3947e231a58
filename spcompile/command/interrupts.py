"""Ctrl-C ends a command with one line and the exit status 130, also while it waits for processes that it started."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STATUS = 128 + signal.SIGINT


@contextlib.contextmanager
def interrupts_for_this_process_alone() -> Iterator[None]:
    """Processes started in this block do not see Ctrl-C, which a terminal sends to all: this one ends them.

    Each would print where it was. They inherit the mask of the thread that starts them. A second thread, which does
    nothing, is there to take the signal.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True, name="takes Ctrl-C").start()
    handler = signal.signal(signal.SIGINT, _interrupt)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done.set()
        signal.signal(signal.SIGINT, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while processes are ended
    logging.disable(logging.WARNING)  # the launcher tells of every process that it ends
    raise KeyboardInterrupt
