"""What a call really takes on a CPU, as PyTorch's allocator counts: to hold plans to account."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_on_cpu(run: Callable[[], Any]) -> int:
    """The most bytes that are given out at once during a call, beyond those before it.

    Read off the profiler's trace, where every allocation of this thread is an event.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    allocations = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    allocations.sort(key=lambda one: one[0])
    return max(accumulate(count for _, count in allocations), default=0)
