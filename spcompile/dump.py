"""`options={"dump": DIR}`: the graph after every pass as numbered text, the differences, and the final Python."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

from spcompile.pipeline import Snapshot
from spcompile.printer import unified_diff

_counter = itertools.count()


def dump_to(folder: str) -> Callable[[Snapshot], None]:
    """A listener that writes each snapshot to DIR/rank<r>/graph<k>/<number>-<pass>.txt and its diff beside it."""
    rank = os.environ.get("RANK", "0")
    target = Path(folder) / f"rank{rank}" / f"graph{next(_counter)}"
    target.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []

    def write(snapshot: Snapshot) -> None:
        number = f"{len(texts):02d}-{snapshot.name}"
        (target / f"{number}.txt").write_text(snapshot.text)
        if texts and snapshot.name not in ("forward", "backward", "inference"):
            (target / f"{number}.diff").write_text(unified_diff(texts[-1], snapshot.text))
        texts.append(snapshot.text)

    return write
