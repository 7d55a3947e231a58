"""A plan as one HTML page: answers, pictures and tables, and every graph beside the one that it was made of.

Needs no network and no other file. Everything that comes from a model is escaped: in HTML by `html.escape`; what the
script reads is packed as base64, and the script itself only ever sets `textContent`. Characters that are not printable
are written as escapes everywhere. Layers that are equal are folded by the script; it draws what is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import sympy

from spcompile.diagnostics import Remark
from spcompile.machine.byte_sizes import bytes_text
from spcompile.machine.mesh import MeshShape
from spcompile.memory.account import Memory
from spcompile.plain_text import one_line, some_lines
from spcompile.report.mesh_picture import mesh_picture
from spcompile.report.page_data import graph_rows, packed, sent_marks, source_lines, streams
from spcompile.schedule.communication import Send
from spcompile.schedule.timeline import Event

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, rows
_FOLDER = Path(__file__).parent
_PLACE_TEXT = re.compile(r"[^\s:]+:\d+")
_STATES = {"S": "S split", "R": "R replicate", "I": "I invariant", "P": "P partial sum"}


@dataclass(frozen=True)
class PageContent:
    """What a page shows. first: the lines that answer first. schedule: names of the passes behind autograd.

    prefixes: of a table's graphs by its title, where a model has several parts. length: of the sequence, if known.
    """

    title: str
    first: Sequence[str]
    tables: Sequence[Table]
    remarks: Sequence[Remark]
    graphs: Mapping[str, str]
    schedule: Collection[str]
    mesh: MeshShape
    order: str
    length: int | None
    memory: Memory
    sends: Mapping[str, Sequence[Send]]
    events: Mapping[str, Sequence[Event]]
    files: Mapping[str, str]
    prefixes: Mapping[str, str] = field(default_factory=dict)


def page(content: PageContent) -> str:
    """The page's text."""
    title = _shown(content.title)
    sources = source_lines(content.graphs, content.files)
    made = sorted({place for text in content.graphs.values() for place in re.findall(r"^# ([^ ]+:\d+)", text, re.M)})
    data = graph_rows(content.graphs, content.schedule)
    data |= {
        "sends": sent_marks(content.sends, _size),
        "events": streams(content.events),
        "sources": sources,
        "made": [one_line(place) for place in made],
    }
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{(_FOLDER / 'page.css').read_text()}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<div class="first">{escape(chr(10).join(map(one_line, content.first)))}</div>',
        "<h2>Mesh</h2>",
        mesh_picture(content.mesh, content.order, content.length),
        *_memory_bars(content.memory),
        *_timelines(content.events),
        *_remarks(content),
        *(_table(table, content) for table in content.tables),
        _viewer(),
        f'<script type="text/plain" id="data">{packed(data)}</script>',
        f"<script>{(_FOLDER / 'page.js').read_text()}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _viewer() -> str:
    """Where the script shows graphs and the lines of the user's files."""
    legend = "".join(f'<span class="{state}">{text}</span>' for state, text in _STATES.items())
    legend += '<span class="add">new</span><span class="del">gone</span><span class="chg">changed</span>'
    legend += '<span class="comm">&#8644; sent by a rank</span>'
    return (
        '<h2 id="graphs">Graphs</h2><div class="tools">'
        '<label>after <select id="pick"></select></label>'
        '<label><input type="checkbox" id="changes"> changes only</label>'
        '<button id="previous" title="key k">previous change</button>'
        '<button id="next" title="key j">next change</button>'
        '<input id="search" type="search" placeholder="search (key /)" aria-label="search in this graph">'
        '<span id="found" role="status"></span></div>'
        f'<div class="legend">{legend}</div><div class="caption" id="state"></div>'
        '<div class="caption">left the graph before, right after the pass; a click shows where a value is used. '
        "Keys: [ and ] passes, j and k changes, / search, Enter next, Esc nothing picked</div>"
        '<div id="view" class="panes" tabindex="0"></div>'
        '<h2>Lines of the model</h2><div id="sources"></div>'
    )


def _memory_bars(memory: Memory) -> list[str]:
    """What a rank holds when most is alive, for each final graph, with a line where the budget is."""
    sizes = [(row, (memory.parameter_bytes, memory.optimizer_bytes, row.kept, row.transient)) for row in memory.phases]
    if not sizes or not all(size.is_number for _, found in sizes for size in found):
        return []
    totals = [sum(float(size) for size in found) for _, found in sizes]
    full = max([*totals, memory.budget_bytes or 0, 1])
    names = ("parameters", "optimizer", "saved, gradients, results", "transient")
    parts = ["<h2>Memory of one rank, when most is alive</h2>"]
    for (row, found), total in zip(sizes, totals, strict=True):
        parts.append(f'<div class="caption">{escape(row.phase)}: {bytes_text(total)}, at {_shown(row.where)}</div>')
        spans = "".join(
            f'<span class="m{place}" style="width:{100 * float(size) / full:.2f}%" '
            f'title="{name} {_size(size)}">{name} {_size(size)}</span>'
            for place, (name, size) in enumerate(zip(names, found, strict=True))
        )
        budget = memory.budget_bytes
        line = f'<i style="left:{100 * budget / full:.2f}%" title="budget {bytes_text(budget)}"></i>' if budget else ""
        parts.append(f'<div class="bar">{spans}{line}</div>')
    if memory.budget_bytes:
        parts.append(f'<div class="caption">the red line is the budget, {bytes_text(memory.budget_bytes)}</div>')
    return parts


def _timelines(events: Mapping[str, Sequence[Event]]) -> list[str]:
    parts = ["<h2>Predicted time of one rank; all ranks do the same</h2>"] if events else []
    for graph, found in events.items():
        end = max((event.start + event.seconds for event in found), default=0.0)
        parts.append(f'<div class="caption">{_shown(graph)}: {1e3 * end:,.4g} ms</div>')
        name = _shown(graph)
        parts.append(f'<canvas data-graph="{name}" role="img" aria-label="timeline of {name}"></canvas>')
    return parts


def _remarks(content: PageContent) -> list[str]:
    """Each with links to the values that it is about and to its line."""
    if not content.remarks:
        return []
    where = _first_graphs(content.graphs)
    items = []
    for remark in content.remarks:
        links = [_link(name, where[name], name) for name in remark.values[:3] if name in where]
        source = remark.where
        if source is not None:
            links.append(_place_link(f"{source.file.rpartition('/')[2]}:{source.line}"))
        more = f" and {len(remark.values) - 3} more" if len(remark.values) > 3 else ""
        items.append(f"<li>{escape(some_lines(f'{remark.code} {remark.text}'))} {' '.join(links)}{more}</li>")
    return [f"<h2>Remarks</h2><ul>{''.join(items)}</ul>"]


def _first_graphs(graphs: Mapping[str, str]) -> dict[str, str]:
    """By name of a node the first graph that has it."""
    found: dict[str, str] = {}
    for graph, text in graphs.items():
        for name in re.findall(r"^([^\s:#]+): ", text, re.M):
            found.setdefault(name, graph)
    return found


def _table(table: Table, content: PageContent) -> str:
    title, header, rows = table
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{_cells(title, header, row, content)}</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cells(title: str, header: Sequence[str], row: Sequence[str], content: PageContent) -> str:
    by_name = dict(zip(header, row, strict=True))
    cells = [_place_link(cell) if name == "source" else _shown(cell) for name, cell in by_name.items()]
    target = _target(title, by_name, content)
    if target is not None:
        cells[0] = _link(row[0], *target)
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _target(title: str, row: Mapping[str, str], content: PageContent) -> tuple[str, str] | None:
    """(graph, node) that a row of a table is about."""
    prefix = content.prefixes.get(title, "")
    if "pass" in row:
        backward = " (backward)" if row["graph"] == "backward" else ""
        return f"{prefix}{row['pass']}{backward}", ""
    phase = row.get("phase", "").partition(", ")[0]
    graph = prefix + ("forward" if phase == "inference" else phase)
    if "name" in row:
        return graph, row["name"]
    if "op" in row:
        for send in content.sends.get(graph, ()):
            place = f"{send.source.file.rpartition('/')[2]}:{send.source.line}" if send.source else ""
            if (send.op, send.axis, send.layer, place) == (row["op"], row["axis"], row["layer"], row["source"]):
                return graph, send.node
    return None


def _link(text: str, graph: str, node: str) -> str:
    return f'<button class="link" data-graph="{_shown(graph)}" data-node="{_shown(node)}">{_shown(text)}</button>'


def _place_link(place: str) -> str:
    if not _PLACE_TEXT.fullmatch(place):
        return _shown(place)
    return f'<button class="link" data-place="{_shown(place)}">{_shown(place)}</button>'


def _size(size: sympy.Expr) -> str:
    return bytes_text(float(size)) if size.is_number else str(size)


def _shown(text: str) -> str:
    return escape(one_line(text))
