"""Work that one thread does in order, beside the program: it never keeps a process alive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """A daemon thread, started by the first work. An executor's would be joined when the process ends, and may wait."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        """Do this after what was started before; the future has its result, or its error."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._do_all, name=self._name, daemon=True)
            self._thread.start()
        future: Future[Any] = Future()
        self._work.put((future, work))
        return future

    def _do_all(self) -> None:
        while True:
            future, work = self._work.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
