"""When a copy to the host or back starts, and when it is waited for.

A copy to the host starts behind the call that made the value. Its wait stands where the tables say that it is there,
behind the last reader. A copy back starts so early that it is there `AHEAD` times its own seconds before its first
reader. At most `FLYING` copies of a direction are on their way at once, so that few values are on the device for the
sake of copies; where a copy takes longer than the calls beside it, compute waits.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

AHEAD = 2.0
FLYING = 2


@dataclass(frozen=True)
class Window:
    """start, end: the calls, by place, in front of which a copy starts and is waited for. late: seconds of the wait."""

    start: int
    end: int
    late: float


def windows_out(seconds: Sequence[float], copies: Sequence[tuple[int, int, float]]) -> list[Window]:
    """Of copies to the host.

    seconds: of each call of a graph. copies: (place of the call that makes the value, of its last reader, seconds of
    the copy), in the order in which values are made.
    """
    times = [0.0, *itertools.accumulate(seconds)]
    found: list[Window] = []
    delay = free = 0.0
    for number, (made, last_read, takes) in enumerate(copies):
        arrival = max(times[made + 1] + delay, free) + takes
        latest = copies[number + FLYING][0] if number + FLYING < len(copies) else len(seconds)
        there = bisect.bisect_left(times, arrival - delay)
        end = min(max(last_read + 1, min(there, latest)), len(seconds))
        late = max(0.0, arrival - delay - times[end])
        delay, free = delay + late, arrival
        found.append(Window(made + 1, end, late))
    return found


def windows_back(seconds: Sequence[float], copies: Sequence[tuple[int, float]]) -> list[Window]:
    """Of copies back.

    copies: (place of the first reader, seconds of the copy), in the order of first readers.
    """
    times = [0.0, *itertools.accumulate(seconds)]
    starts: list[int] = []
    begin = times[-1]
    for number in reversed(range(len(copies))):
        read, takes = copies[number]
        begin = min(begin, times[read]) - AHEAD * takes
        earliest = copies[number - FLYING][0] if number >= FLYING else 0
        starts.append(max(earliest, min(read, bisect.bisect_right(times, begin) - 1)))
    found: list[Window] = []
    delay = free = 0.0
    for (read, takes), start in zip(copies, reversed(starts), strict=True):
        free = max(times[start] + delay, free) + takes
        late = max(0.0, free - delay - times[read])
        delay += late
        found.append(Window(start, read, late))
    return found
