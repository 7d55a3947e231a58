"""Ctrl-C ends a command with one line and the exit status 130, also while it waits for processes that it started."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

STATUS = 128 + signal.SIGINT
_AGAIN = 0.02  # seconds, after which a signal that came too early is sent once more


@contextlib.contextmanager
def interrupts_for_this_process_alone() -> Iterator[None]:
    """Processes started by multiprocessing in this block do not see Ctrl-C, which a terminal sends to all.

    Each would print where it was; this one ends them. They inherit the mask of the thread that starts them. A second
    thread, which does nothing, is there to take the signal. Each process calls `end_silently` as soon as it runs.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True, name="takes Ctrl-C").start()
    handler = signal.signal(signal.SIGINT, _interrupt)
    resource_tracker.ensure_running()  # which, where it is started later, unblocks the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    others = multiprocessing.active_children()
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # those that the launcher had not noted yet
            if process not in others:
                process.kill()
                process.join()
        logging.disable(logging.NOTSET)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        done.set()
        signal.signal(signal.SIGINT, handler)


def end_silently() -> None:
    """From now on Ctrl-C, and the end of the process that started this one, end it without a word."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(STATUS))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _is_starting_a_process(frame):
        threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT)).start()
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while processes are ended
    logging.disable(logging.WARNING)  # the launcher tells of every process that it ends
    raise KeyboardInterrupt


def _is_starting_a_process(frame: FrameType | None) -> bool:
    """Whether a process is half started: what it still reads would end in the middle, and it would say so."""
    while frame is not None:
        if frame.f_code is multiprocessing.Process.start.__code__:
            return True
        frame = frame.f_back
    return False
