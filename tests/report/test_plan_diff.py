"""`spcompile diff`: facts that differ, each once; hostile files are one clear error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from spcompile.diagnostics import IllegalOption
from spcompile.report.plan_diff import Difference, as_text, differences, read_plan
from spcompile.report.plan_json import SCHEMA_VERSION


def plan() -> dict[str, Any]:
    sent = {"axis": "cp", "phase": "forward", "count": 2, "bytes": 2048, "layer": "", "source": None}
    return {
        "schema_version": SCHEMA_VERSION,
        "model": "M",
        "mesh": {"cp": 2},
        "options": {"attention": "auto"},
        "attention": [{"strategy": "ring", "count": 2, "heads": 4, "kv_heads": 2, "mask": "causal", "scores": ""}],
        "collectives": [{"op": "all_gather", "origin": "activation", **sent}] * 2,
        "memory": {"saved_activation_bytes": 4096, "fits": True, "budget_bytes": None, "actions": []},
        "predicted": {
            "phases": [{"phase": "forward", "seconds": 1.0, "compute": 0.5, "communication": 0.5, "exposed": 0.5}]
        },
        "remarks": [{"code": "SPR203", "text": "ring"}],
        "passes": [{"name": "lower", "rewrites": 3, "milliseconds": 1.0}],
    }


def test_equal_plans_differ_in_nothing() -> None:
    other = plan()
    other["passes"][0]["milliseconds"] = 2.0
    assert differences(plan(), other) == []
    assert as_text([]) == "the plans are the same"


def test_each_fact_that_differs_is_told_once() -> None:
    other = plan()
    other["mesh"] = {"tp": 2}
    other["memory"] |= {
        "saved_activation_bytes": "8*s0",
        "actions": [{"kind": "recompute", "bytes": 1024}, {"kind": "recompute", "bytes": 1024}],
    }
    other["collectives"] = other["collectives"][:1]
    other["remarks"] = []
    found = differences(plan(), other)
    assert found == [
        Difference("program", "mesh", "cp=2", "tp=2"),
        Difference("memory of a rank", "saved_activation_bytes", "4.00 KiB", "8*s0"),
        Difference("collectives", "forward, cp, all_gather for activation", "4 times, 4.00 KiB", "2 times, 2.00 KiB"),
        Difference("remarks", "SPR203 ring", "1", None),
        Difference("memory of a rank", "saved by recompute", None, "2.00 KiB"),
    ]
    assert as_text(found).splitlines()[:2] == ["program", "    mesh: cp=2 -> tp=2"]
    assert "  + saved by recompute: 2.00 KiB" in as_text(found)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan()))
    assert read_plan(str(file)) == plan()


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "[" * 100_000, '{"schema_version": 99}', f'{{"schema_version": {SCHEMA_VERSION}}}']
)
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    for wrong in (file, tmp_path / "none.json", tmp_path):
        with pytest.raises(IllegalOption, match=r"explain --json") as error:
            read_plan(str(wrong))
        assert wrong.name in str(error.value)


@pytest.mark.parametrize("section", ["attention", "collectives", "remarks", "passes"])
def test_an_entry_that_is_none_is_an_error(section: str) -> None:
    for entry in (None, [], {}, 7):
        other = copy.deepcopy(plan())
        other[section] = [entry]
        with pytest.raises(IllegalOption, match="entry of a plan"):
            differences(plan(), other)


def test_names_with_escapes_are_shown_escaped() -> None:
    other = plan() | {"model": "\x1b]0;title\x07\n"}
    assert "\x1b" not in as_text(differences(plan(), other))
