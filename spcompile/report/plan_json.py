"""A plan as what JSON can hold, for programs that read it."""

from __future__ import annotations

from typing import Any

import sympy

from spcompile.diagnostics import SourceLine

SCHEMA_VERSION = 1


def as_json(plan: Any) -> dict[str, Any]:
    """See `Plan.to_dict`; a `Plan`, whose module imports this one."""
    memory = {
        name: _json_number(value) for name, value in vars(plan.memory).items() if name not in ("actions", "phases")
    }
    memory["phases"] = [{name: _json_number(value) for name, value in vars(row).items()} for row in plan.memory.phases]
    memory["actions"] = [{**vars(row), "source": _source(row.source)} for row in plan.memory.actions]
    return {
        **({"parts": [part.to_dict() for part in plan.parts]} if plan.parts else {}),
        "schema_version": SCHEMA_VERSION,
        "model": plan.model,
        **({"folded": {"count": plan.folded.count, "compiled": list(plan.folded.compiled)}} if plan.folded else {}),
        "mesh": dict(plan.mesh.axes),
        "options": {name: value for name, value in plan.options.items() if _fits_json(value)},
        "symbols": plan.symbols,
        "answers": plan.answers.to_dict(plan.memory, plan.predicted),
        "sharding": {name: _json_number(value) for name, value in vars(plan.sharding).items()},
        "attention": [dict(vars(row)) for row in plan.attention],
        "collectives": [
            {
                **{key: value for key, value in vars(row).items() if key != "at_most" or value},
                "bytes": _json_number(row.bytes),
                "source": _source(row.source),
            }
            for row in plan.collectives
        ],
        "memory": memory,
        "remarks": [remark.to_dict() for remark in plan.remarks],
        "predicted": {
            "assumptions": list(plan.predicted.assumptions),
            "phases": [{**vars(row), "hidden": row.hidden} for row in plan.predicted.phases],
        },
        "passes": [dict(vars(row)) for row in plan.passes],
        "largest_tensors": [
            {
                "name": row.name,
                "phase": row.phase,
                "shape": [_json_number(size) for size in row.shape],
                "numel": _json_number(row.numel),
                "count": row.count,
                "dtype": str(row.dtype).removeprefix("torch."),
                "source": _source(row.source),
            }
            for row in plan.largest_tensors
        ],
    }


def _json_number(value: Any) -> Any:
    if not isinstance(value, sympy.Basic):
        return value
    return int(value) if value.is_Integer else float(value) if value.is_number else str(value)


def _source(source: SourceLine | None) -> dict[str, Any] | None:
    return {"file": source.file, "line": source.line, "text": source.text} if source else None


def _fits_json(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, dict, list))
