"""Looks at what one rank of a ring asks its driver for."""

from __future__ import annotations

from typing import Any

from spcompile.collectives.point_to_point import Requests, Shift


def noted(requests: Requests[Any], shifts: list[Shift]) -> Requests[Any]:
    """The same requests, with every shift appended to `shifts`."""
    answer = None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration as stop:
            return stop.value
        if isinstance(request, Shift):
            shifts.append(request)
        answer = yield request
