"""A plan as one HTML page: the tables of the report, and the graph after every pass with its differences.

Needs no network and no other file. Everything that comes from a model is escaped: in HTML by `html.escape`, in the
data of the script by writing `<` as an escape, and the script itself only ever sets `textContent`. Characters that are
not printable are written as escapes everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from spcompile.graph.printer import unified_diff
from spcompile.plain_text import one_line, some_lines

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, rows
_BACKWARD = " (backward)"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --add: #2a72; --del: #d332; --note: #888; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td, pre { font-family: ui-monospace, monospace; font-size: 12px; }
pre { overflow: auto; max-height: 75vh; border: 1px solid var(--line); padding: .8rem; }
pre span { display: block; min-height: 1.5em; white-space: pre; }
.add { background: var(--add); } .del { background: var(--del); } .note { color: var(--note); }
select, label { font: inherit; margin-right: 1rem; }
"""

_SCRIPT = """
const graphs = JSON.parse(document.getElementById("graphs").textContent);
const pick = document.getElementById("pick"), differ = document.getElementById("differ");
const view = document.getElementById("view");
for (const graph of graphs) {
  const option = document.createElement("option");
  option.textContent = graph.name;
  pick.append(option);
}
function kind(line, isDiff) {
  if (line.startsWith("#") || (isDiff && line.startsWith("@@"))) return "note";
  if (isDiff && line.startsWith("+")) return "add";
  if (isDiff && line.startsWith("-")) return "del";
  return "";
}
function show() {
  const graph = graphs[pick.selectedIndex];
  differ.disabled = graph.diff === null;
  const isDiff = differ.checked && graph.diff !== null;
  const text = isDiff ? (graph.diff || "# nothing changed") : graph.text;
  view.replaceChildren(...text.trimEnd().split("\\n").map(line => {
    const span = document.createElement("span");
    span.className = kind(line, isDiff);
    span.textContent = line;
    return span;
  }));
}
pick.addEventListener("change", show);
differ.addEventListener("change", show);
show();
"""


def page(
    title: str,
    summary: Iterable[str],
    tables: Iterable[Table],
    remarks: Iterable[str],
    graphs: Mapping[str, str],
    schedule: Collection[str],
) -> str:
    """The page's text. graphs: of a plan; schedule: the names of the passes that ran behind autograd."""
    title = _shown(title)
    data = json.dumps(_with_differences(graphs, schedule)).replace("<", "\\u003c")
    listed = "".join(f"<li><pre>{escape(some_lines(remark))}</pre></li>" for remark in remarks)
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        "".join(f"<div>{_shown(line)}</div>" for line in summary),
        "".join(_table(name, header, rows) for name, header, rows in tables),
        f"<h2>Remarks</h2><ul>{listed}</ul>" if listed else "",
        '<h2>Graphs</h2><label>after <select id="pick"></select></label>',
        '<label><input type="checkbox" id="differ"> difference to the graph before</label>',
        '<pre id="view"></pre>',
        f'<script type="application/json" id="graphs">{data}</script>',
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _with_differences(graphs: Mapping[str, str], schedule: Collection[str]) -> list[dict[str, str | None]]:
    """Name, text and difference to the graph it was made from; None for a graph that autograd or capture made."""
    rows: list[dict[str, str | None]] = []
    before: dict[str, str] = {}  # kind of graph -> the last text of it
    for name, text in graphs.items():
        is_backward = name == "backward" or name.endswith(_BACKWARD)
        is_late = name in ("forward", "backward") or name.removesuffix(_BACKWARD) in schedule
        kind = "backward" if is_backward else "forward" if is_late else "before autograd"
        diff = unified_diff(before[kind], text) if kind in before else None
        rows.append({"name": name, "text": text, "diff": diff})
        before[kind] = text
    return rows


def _table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _shown(text: str) -> str:
    return escape(one_line(text))
