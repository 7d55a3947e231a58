"""What the script of a plan's page reads: graphs side by side, collectives, a timeline, lines of the user's files.

All text is data. It is packed, as base64 of zlib, since a graph after each of forty passes is much the same text.
"""

from __future__ import annotations

import base64
import json
import linecache
import re
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from spcompile.plain_text import one_line
from spcompile.report.aligned_graphs import folds, rows_of, without_numbers
from spcompile.schedule.communication import Send
from spcompile.schedule.timeline import Event

BACKWARD = " (backward)"
_AROUND = 2  # lines of a user's file that are shown beside those that made a graph
_PLACE = re.compile(r"^# (?P<file>[^ ]+):(?P<line>\d+)(?:  |$)")


def packed(data: Any) -> str:
    """As text that a page may hold anywhere: letters, digits, `+`, `/` and `=`."""
    return base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 9)).decode()


def unpacked(text: str) -> Any:
    """The data again."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def graph_rows(graphs: Mapping[str, str], schedule: Collection[str]) -> dict[str, Any]:
    """`lines`: every different line once. `graphs`: of each its lines, rows of it and of the graph before, and folds.

    lines, rows: runs, as `[first, count]` of places in `lines`, and `[line before, line after, count]`, where -1 stands
    for no line.
    schedule: names of the passes that ran behind autograd.
    """
    pool: dict[str, int] = {}
    plain: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    last: dict[str, tuple[int, list[str]]] = {}  # kind of graph -> the last one
    for name, text in graphs.items():
        lines = _lines_of(text)
        ids = [pool.setdefault(line, len(pool)) for line in lines]
        own = name.partition(": ")[2] or name  # without the number of a part
        is_backward = own == "backward" or own.endswith(BACKWARD)
        is_late = own in ("forward", "backward") or own.removesuffix(BACKWARD) in schedule
        kind = name.partition(":")[0] if name.startswith("part ") else ""
        kind += "backward" if is_backward else "forward" if is_late else "before autograd"
        number, before = last.get(kind, (None, []))
        rows = rows_of(before, lines) if number is not None else [(-1, at) for at in range(len(lines))]
        plain |= {line: without_numbers(line) for line in lines if line not in plain}
        symbols = [(plain[before[a]] if a >= 0 else None, plain[lines[b]] if b >= 0 else None) for a, b in rows]
        changed = sum(a < 0 or b < 0 or before[a] != lines[b] for a, b in rows) if number is not None else 0
        found.append(
            {
                "name": name,
                "before": number,
                "lines": _number_runs(ids),
                "rows": _row_runs(rows),
                "folds": folds(symbols),
                "changed": changed,
            }
        )
        last[kind] = len(found) - 1, lines
    return {"lines": list(pool), "graphs": found}


def _lines_of(text: str) -> list[str]:
    """Without the title, which says after which pass this is."""
    lines = [one_line(line) for line in text.splitlines()]
    return lines[1:] if lines and lines[0].startswith("# stage ") else lines


def _number_runs(numbers: Sequence[int]) -> list[int]:
    found: list[int] = []
    for number in numbers:
        if found and number == found[-2] + found[-1]:
            found[-1] += 1
        else:
            found += [number, 1]
    return found


def _row_runs(rows: Iterable[tuple[int, int]]) -> list[int]:
    found: list[int] = []
    for left, right in rows:
        if found and _follows(found[-3], found[-1], left) and _follows(found[-2], found[-1], right):
            found[-1] += 1
        else:
            found += [left, right, 1]
    return found


def _follows(first: int, count: int, number: int) -> bool:
    return number == -1 if first == -1 else number == first + count


def sent_marks(sends: Mapping[str, Sequence[Send]], text_of: Any) -> dict[str, dict[str, str]]:
    """By graph and node: along which axis a collective goes, and how much a rank sends."""
    return {
        graph: {send.node: f"{send.axis} {text_of(send.bytes)}" for send in found} for graph, found in sends.items()
    }


def streams(events: Mapping[str, Sequence[Event]]) -> dict[str, Any]:
    """By graph: names of streams, and columns of events; milliseconds."""
    result = {}
    for graph, found in events.items():
        names = list(dict.fromkeys(["compute", *(event.stream for event in found)]))
        result[graph] = {
            "streams": names,
            "stream": [names.index(event.stream) for event in found],
            "node": [event.node for event in found],
            "start": [round(1e3 * event.start, 4) for event in found],
            "ms": [round(1e3 * event.seconds, 4) for event in found],
        }
    return result


def source_lines(graphs: Mapping[str, str], files: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """By file and number: the lines that made the graphs, and some around them, as far as Python knows them."""
    wanted: dict[str, dict[int, str]] = {}
    for text in graphs.values():
        for line in text.splitlines():
            place = _PLACE.match(line)
            if place is not None:
                wanted.setdefault(place["file"], {})[int(place["line"])] = line.partition("  ")[2]
    found: dict[str, dict[int, str]] = {}
    for name, numbers in wanted.items():
        lines = linecache.getlines(files[name]) if name in files else []
        around = {at for n in numbers for at in range(n - _AROUND, n + _AROUND + 1) if 1 <= at <= len(lines)}
        texts = {at: lines[at - 1].rstrip("\n") if at <= len(lines) else numbers[at] for at in around | set(numbers)}
        found[one_line(name)] = {at: one_line(texts[at]) for at in sorted(texts)}
    return found
