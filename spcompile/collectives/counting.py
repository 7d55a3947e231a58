"""Which collectives a piece of code really runs, counted where process groups start them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ExecutionTraceObserver

BACKENDS = ("gloo:", "nccl:")


@dataclass(frozen=True)
class Traffic:
    """All calls of one collective: `bytes` is the size of what this rank handed to them."""

    op: str
    count: int
    bytes: int


def count_collectives(run: Callable[[], object]) -> list[Traffic]:
    """The collectives that one call of `run` starts on this rank, most bytes first; compiled code included.

    Receives are not listed: each is another rank's send.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        observer = ExecutionTraceObserver()
        observer.register_callback(str(file))
        observer.start()
        try:
            run()
        finally:
            observer.stop()
            observer.unregister_callback()
        nodes = json.loads(file.read_text())["nodes"]
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for node in nodes:
        name = node["name"]
        if name.startswith(BACKENDS) and not name.endswith(":recv"):
            op = name.partition(":")[2].lstrip("_")
            count[op] += 1
            size[op] += sum(_tensor_bytes(value) for value in node["inputs"]["values"])
    return sorted((Traffic(op, count[op], size[op]) for op in count), key=lambda row: -row.bytes)


def _tensor_bytes(value: Any) -> int:
    """Bytes of one traced argument; a tensor is `[id, storage id, offset, elements, bytes per element, device]`."""
    if isinstance(value, list) and len(value) == 6 and isinstance(value[5], str):
        return int(value[3]) * int(value[4])
    return sum(_tensor_bytes(item) for item in value) if isinstance(value, list) else 0
