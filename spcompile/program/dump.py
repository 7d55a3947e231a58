"""`options={"dump": DIR}`: the graph after every pass as numbered text, the differences, and the final Python."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch.fx as fx

from spcompile.graph.printer import unified_diff
from spcompile.program.pipeline import Snapshot

FINAL = ("forward", "backward", "inference")
_HEADER = """import torch
from torch import device, inf, nan

import spcompile.attention.op  # defines the attention ops
import spcompile.collectives  # defines the collectives

"""
_counter = itertools.count()


class Dump:
    """Writes one compile to DIR/rank<r>/graph<k>/: the folder is new for every graph of a process."""

    def __init__(self, folder: str) -> None:
        rank = os.environ.get("RANK", "0")
        self.folder = Path(folder) / f"rank{rank}" / f"graph{next(_counter)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._texts: list[str] = []

    def snapshot(self, snapshot: Snapshot) -> None:
        """<number>-<pass>.txt, and what the pass changed in <number>-<pass>.diff."""
        number = f"{len(self._texts):02d}-{snapshot.name}"
        (self.folder / f"{number}.txt").write_text(snapshot.text)
        if self._texts and snapshot.name not in FINAL:
            (self.folder / f"{number}.diff").write_text(unified_diff(self._texts[-1], snapshot.text))
        self._texts.append(snapshot.text)

    def python(self, phase: str, gm: fx.GraphModule) -> None:
        """<phase>.py: the final graph as a Python function over plain tensors; axes are c10d group names to fill in."""
        (self.folder / f"{phase}.py").write_text(python_of(gm))


def python_of(gm: fx.GraphModule) -> str:
    """A module that defines `forward(self, ...)`: call it with None for self. It is for reading and for experiments."""
    return _HEADER + gm.code.lstrip("\n")
