"""docs/coverage.md, from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

BAR = 1.15  # of (one device / n), for what has attention
HEAD = """# Coverage

Models that others wrote, unchanged, on `cp` = 2 and on `tp` = 2: all ranks run in one process (`spcompile.verify`), and
loss, outputs and every gradient are compared with the plain model's. Models are in eval mode, have two layers,
and no parameter is constant. All is float64, but for models with experts, which are in float32. `make coverage` wrote
this page, with torch {torch} and transformers {transformers}. At which commit a model was measured is in
`benchmarks/coverage/measured.jsonl`.

- *error* is the largest of any tensor: absolute, or relative to its largest element, whichever is less. A model that
  rounds to float32 inside shows it.
- *memory* is what one rank saves for the backward, times 2, over what one device saves. 1.00 is all that can be gained.
- *breaks*: Dynamo makes several graphs of it, and each is sharded on its own (`on_graph_break="gather"`).
"""


def text(found: Sequence[Mapping[str, Any]], models: int) -> str:
    """The page. models: how many there are to measure."""
    import transformers

    ran = [one for one in found if "unable" not in one]
    lines = [HEAD.format(torch=torch.__version__.partition("+")[0], transformers=transformers.__version__)]
    lines += [
        f"Measured so far: {len(found)} of {models} models, of which {len(found) - len(ran)} do not run by themselves.",
        "",
    ]
    lines += ["| of " + str(len(ran)) + " models | cp | tp |", "| --- | ---: | ---: |"]
    for title, is_so in _COUNTS.items():
        lines.append(
            f"| {title} | " + " | ".join(str(sum(is_so(one["meshes"][m]) for one in ran)) for m in _MESHES) + " |"
        )
    for kind in dict.fromkeys(one["kind"] for one in found):
        lines += ["", f"## {kind}", "", "| model | cp: error | memory | remarks | tp: error | memory | remarks |"]
        lines.append("| --- | ---: | ---: | --- | ---: | ---: | --- |")
        lines += [_row(one) for one in ran if one["kind"] == kind]
    lines += ["", "## Errors and wrong numbers", "", *_failures(ran)]
    lines += ["", "## Not run", "", "With these small sizes the plain model itself does not run, or not in time:", ""]
    lines += [f"- {one['kind']} `{one['name']}`: {_words(one['unable'])}" for one in found if "unable" in one]
    return "\n".join(lines) + "\n"


def line(one: Mapping[str, Any]) -> str:
    """A model in one line."""
    if "unable" in one:
        return f"{one['kind']}/{one['name']}: not run: {one['unable'][:80]}"
    parts = [f"{mesh} {' '.join(_cells(one['meshes'][mesh]))}" for mesh in _MESHES]
    return f"{one['kind']}/{one['name']}: {'; '.join(parts)}"


_MESHES = ("cp", "tp")
_COUNTS = {
    "exact, memory at most 1.15": lambda one: one.get("ok", False) and (one.get("ratio") or 9) <= BAR,
    "exact, memory at most 1.5": lambda one: one.get("ok", False) and BAR < (one.get("ratio") or 9) <= 1.5,
    "exact, more memory": lambda one: one.get("ok", False) and not one["broken"] and (one.get("ratio") or 9) > 1.5,
    "exact, graph by graph": lambda one: one.get("ok", False) and one["broken"],
    "refused with an error": lambda one: "error" in one,
    "wrong": lambda one: not one.get("ok", True),
}


def _cells(one: Mapping[str, Any]) -> tuple[str, str, str]:
    if "error" in one:
        return "error", "", ""
    ratio = "breaks" if one["broken"] else f"{one['ratio']:.2f}" if one.get("ratio") else ""
    return f"{one['worst']:.0e}" + ("" if one["ok"] else " WRONG"), ratio, " ".join(one["remarks"])


def _row(one: Mapping[str, Any]) -> str:
    return " | ".join([f"| {one['name']}", *(cell for mesh in _MESHES for cell in _cells(one["meshes"][mesh]))]) + " |"


def _failures(ran: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for one in ran:
        for mesh in _MESHES:
            on = one["meshes"][mesh]
            if "error" in on:
                yield f"- {one['kind']} `{one['name']}` on {mesh}: {_words(on['error'])}"
            elif not on["ok"]:
                yield f"- {one['kind']} `{one['name']}` on {mesh}: wrong: {', '.join(on['wrong'])}"


def _words(said: str) -> str:
    return said[:200].replace("|", "\\|").replace("<", "&lt;")
