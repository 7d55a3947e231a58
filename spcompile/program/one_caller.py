"""One thread at a time runs compiled models of a mesh, in the process that joined the group.

Collectives of two threads would meet in another order on each rank. A forked child has copies of connections that are
its parent's.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from spcompile.diagnostics import ForkedChild, TwoThreads


class OneCaller:
    """Says who runs compiled models now."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._free = threading.Condition()
        self._owner: threading.Thread | None = None
        self._depth = 0
        self._doing = ""

    @contextlib.contextmanager
    def inside(self, doing: str) -> Iterator[TwoThreads | None]:
        """What happens in it happens in no two threads at once; one thread may enter again.

        Yields an error for the thread that came while another was inside, which has waited until that one left.

        Raises:
            ForkedChild: this process was forked from the one that joined the group. Nothing is communicated.
        """
        self.refuse_forks(doing)
        thread = threading.current_thread()
        with self._free:
            other = self._owner if self._owner is not thread else None
            error = _refusal(thread, doing, other, self._doing) if other is not None else None
            self._free.wait_for(lambda: self._owner in (None, thread))
            self._owner, self._depth = thread, self._depth + 1
            before, self._doing = self._doing, doing
        try:
            yield error
        finally:
            with self._free:
                self._depth, self._doing = self._depth - 1, before
                if self._depth == 0:
                    self._owner = None
                self._free.notify_all()

    def refuse_forks(self, doing: str) -> None:
        """Raises ForkedChild where this process is not the one that joined the group."""
        if os.getpid() != self._process:
            raise ForkedChild(
                f"process {os.getpid()}, a child of rank process {self._process}, {doing}",
                legal="compiled models are called in the process that called init_process_group; children by spawn, "
                "with a process group of their own",
            )


def _refusal(thread: threading.Thread, doing: str, other: threading.Thread, runs: str) -> TwoThreads:
    return TwoThreads(
        f"thread {thread.name!r} {doing}, while thread {other.name!r} {runs}",
        legal="calls of compiled models, and backwards of them, from one thread at a time",
    )
