"""`options={"dump": DIR}`: the graph after every pass as numbered text, the differences, and the final Python."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
import torch.fx as fx

from spcompile.diagnostics import IllegalOption
from spcompile.graph.printer import format_graph, unified_diff
from spcompile.passes_api import PassReport, Stage
from spcompile.program.pipeline import Snapshot

FINAL = ("forward", "backward", "inference")
_HEADER = """import torch
from torch import device, inf, nan

import spcompile.attention.op  # defines the attention ops
import spcompile.collectives  # defines the collectives

"""
_WRITTEN = re.compile(rf"\d\d+-[\w-]+\.(txt|diff)|({'|'.join(FINAL)})\.py")
_PROBE_BYTES = 1 << 16
_LEGAL = "a folder that this user may write to, on a disk with room"
_counter = itertools.count()
_written_to: set[str] = set()  # folders that this process has dumped to


class Dump:
    """Writes one compile to DIR/rank<r>/graph<k>/; the folder is new for every graph of a process.

    folder: None writes nothing. The first failure ends the writing and stays in `failure`.
    """

    def __init__(self, folder: str | None) -> None:
        self.given = folder
        self.failure: IllegalOption | None = None
        self.folder: Path | None = None
        self._texts: list[str] = []

    def start(self) -> None:
        """Make the folder; it holds nothing yet."""
        if self.given is None or self.failure is not None:
            return
        with self._writing(self.given):
            self.folder = Path(self.given) / f"rank{_rank()}" / f"graph{next(_counter)}"
            require_room(self.folder)

    def remove_older(self) -> None:
        """Remove what runs before this process left in DIR."""
        if self.given is not None:
            with self._writing(self.given):
                remove_dumps(Path(self.given))

    def require_written(self) -> None:
        """Raises IllegalOption where something could not be written."""
        if self.failure is not None:
            raise self.failure

    def final(self, phase: str, gm: fx.GraphModule) -> None:
        """A final graph that no pass has made: as text and as Python."""
        self.snapshot(Snapshot(phase, Stage.SCHEDULE, format_graph(gm), PassReport()))
        self.python(phase, gm)

    def snapshot(self, snapshot: Snapshot) -> None:
        """<number>-<pass>.txt, and what the pass changed in <number>-<pass>.diff."""
        number = f"{len(self._texts):02d}-{snapshot.name}"
        self._write(f"{number}.txt", snapshot.text)
        if self._texts and snapshot.name not in FINAL:
            self._write(f"{number}.diff", unified_diff(self._texts[-1], snapshot.text))
        self._texts.append(snapshot.text)

    def python(self, phase: str, gm: fx.GraphModule) -> None:
        """<phase>.py: the final graph as a Python function over plain tensors; axes are c10d group names to fill in."""
        self._write(f"{phase}.py", python_of(gm))

    def _write(self, name: str, text: str) -> None:
        if self.given is None or self.folder is None or self.failure is not None:
            return
        with self._writing(self.given):
            (self.folder / name).write_text(text, encoding="utf-8")

    @contextlib.contextmanager
    def _writing(self, given: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            self.failure = cannot_write(given, error)


def is_first(folder: str | None) -> bool:
    """Whether this process has not dumped to a folder yet; from now on it has."""
    if folder is None or folder in _written_to:
        return False
    _written_to.add(folder)
    return True


def own_dump(folder: str | None) -> Dump | None:
    """Start the dump of one compile on one device, without what an older run left in the folder.

    Raises:
        IllegalOption: it cannot be written to.
    """
    if folder is None:
        return None
    dump = Dump(folder)
    if is_first(folder):
        dump.remove_older()
    dump.start()
    dump.require_written()
    return dump


def python_of(gm: fx.GraphModule) -> str:
    """A module that defines `forward(self, ...)`: call it with None for self. It is for reading and for experiments."""
    return _HEADER + gm.code.lstrip("\n")


def cannot_write(folder: str, error: Exception) -> IllegalOption:
    """What to raise: it names no rank, so that it is the same on all."""
    return IllegalOption(f"dump={folder!r}: {getattr(error, 'strerror', None) or error}", legal=_LEGAL)


def require_room(folder: Path) -> None:
    """Make a folder, write something to it and remove that.

    Raises:
        OSError: a part of the path is no folder, nothing may be written there, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def remove_dumps(folder: Path) -> None:
    """Remove what dumps of older runs have written, of any number of ranks, and nothing else.

    Raises:
        OSError: it cannot be removed.
    """
    for rank in _folders(folder, r"rank\d+"):
        for graph in _folders(rank, r"graph\d+"):
            for file in _entries(graph):
                if _WRITTEN.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            _remove_if_empty(graph)
        _remove_if_empty(rank)


def _folders(parent: Path, pattern: str) -> list[Path]:
    found = [entry for entry in _entries(parent) if re.fullmatch(pattern, entry.name)]
    return [entry for entry in found if entry.is_dir() and not entry.is_symlink()]


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # another rank has removed it
        return []


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a user's own files stay, and so do their folders
        folder.rmdir()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
