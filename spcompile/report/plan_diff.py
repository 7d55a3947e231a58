"""What differs between two plans, read from the JSON that `spcompile explain --json` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spcompile.diagnostics import IllegalOption
from spcompile.machine.byte_sizes import bytes_text
from spcompile.plain_text import one_line
from spcompile.report.plan_json import SCHEMA_VERSION

MOST_BYTES = 256 << 20  # of a file; a plan of 80 layers has 1 MB
_PARTS: Mapping[str, type] = {
    "model": str,
    "mesh": dict,
    "options": dict,
    "attention": list,
    "collectives": list,
    "memory": dict,
    "predicted": dict,
    "remarks": list,
    "passes": list,
}


class Difference(NamedTuple):
    """One fact of both plans; None where a plan does not have it."""

    section: str
    name: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        if self.before is None:
            return f"+ {self.name}: {self.after}"
        if self.after is None:
            return f"- {self.name}: {self.before}"
        return f"  {self.name}: {self.before} -> {self.after}"


def read_plan(file: str) -> dict[str, Any]:
    """A plan's JSON.

    Raises:
        IllegalOption: the file cannot be read, is no plan, or one of another version.
    """
    path = Path(file)
    legal = "a file that spcompile explain --json has printed"
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise ValueError("no plain file, or a huge one")
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise IllegalOption(f"{file!r}: {error}", legal=legal) from None
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise IllegalOption(f"{file!r} is no plan with schema_version {SCHEMA_VERSION}", legal=legal)
    wrong = [name for name, kind in _PARTS.items() if not isinstance(data.get(name), kind)]
    if wrong:
        raise IllegalOption(f"{file!r}: no {', '.join(wrong)} of a plan", legal=legal)
    return data


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Facts that are not the same, in the order of a report. Milliseconds of passes and source lines are left out.

    Raises:
        IllegalOption: an entry of a plan that is none.
    """
    try:
        facts, others = (dict(_facts_of_plan(plan)) for plan in (before, after))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IllegalOption(f"an entry of a plan: {error!r}", legal="files of this version of spcompile") from None
    return [
        Difference(*key, facts.get(key), others.get(key))
        for key in [*facts, *(key for key in others if key not in facts)]
        if facts.get(key) != others.get(key)
    ]


def as_text(found: list[Difference]) -> str:
    """One line for each, under the name of its section."""
    if not found:
        return "the plans are the same"
    lines: list[str] = []
    for section in dict.fromkeys(one.section for one in found):
        lines += [section, *(f"  {one}" for one in found if one.section == section)]
    return "\n".join(map(one_line, lines))


def _facts_of_plan(plan: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    yield ("program", "model"), plan["model"]
    yield ("program", "mesh"), ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    for name, value in plan["options"].items():
        yield ("options", name), str(value)
    for kind, count in _summed(plan["attention"], _kind_of_attention, {"count": 1}).items():
        yield ("attention", kind), f"{count['count']}"
    for name, value in plan["memory"].items():
        if name != "actions":
            is_bytes = name.endswith("_bytes") or "_bytes_" in name
            yield ("memory of a rank", name), _bytes(value) if is_bytes and value is not None else str(value)
    for kind, action in _summed(plan["memory"].get("actions", []), lambda row: row["kind"], {"bytes": 0}).items():
        yield ("memory of a rank", f"saved by {kind}"), _bytes(action["bytes"])
    for kind, sums in _summed(plan["collectives"], _kind_of_collective, {"count": 0, "bytes": 0}).items():
        yield ("collectives", kind), f"{sums['count']} times, {_bytes(sums['bytes'])}"
    for row in plan["predicted"]["phases"]:
        for name in ("seconds", "compute", "communication", "exposed"):
            yield ("predicted", f"{row['phase']}, {name}"), f"{1e3 * row[name]:.3f} ms"
    for kind, sums in _summed(plan["remarks"], lambda row: f"{row['code']} {row['text']}", {"count": 1}).items():
        yield ("remarks", kind), f"{sums['count']}"
    for kind, sums in _summed(plan["passes"], lambda row: row["name"], {"rewrites": 0}).items():
        yield ("rewrites of passes", kind), f"{sums['rewrites']}"


def _summed(rows: list[Any], kind_of: Any, fields: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Sums of fields over rows of one kind. fields: with what counts where a row has no such field."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = sums.setdefault(kind_of(row), dict.fromkeys(fields, 0))
        for name, usual in fields.items():
            known[name] = _added(known[name], row.get(name, usual))
    return sums


def _added(known: Any, more: Any) -> Any:
    """Sizes that depend on a length are texts."""
    if isinstance(known, (int, float)) and isinstance(more, (int, float)):
        return known + more
    return " + ".join(str(size) for size in (known, more) if size != 0)


def _kind_of_attention(row: Mapping[str, Any]) -> str:
    scores = f", {row['scores']}" if row["scores"] else ""
    return f"{row['strategy']}, {row['heads']} heads, {row['kv_heads']} of keys, {row['mask']}{scores}"


def _kind_of_collective(row: Mapping[str, Any]) -> str:
    return f"{row['phase']}, {row['axis']}, {row['op']} for {row['origin']}"


def _bytes(count: Any) -> str:
    return bytes_text(count) if isinstance(count, (int, float)) else str(count)
