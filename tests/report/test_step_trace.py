"""The trace of a predicted step: what viewers of Chrome's format need, and the figures of the plan."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from explained import plan_of

import spcompile
from spcompile.command import cli
from spcompile.report.plan import Plan
from spcompile.report.step_trace import PhaseTrace, in_order_of_a_step


def traced(plan: Plan, folder: Path, ranks: int | None = None) -> dict[str, Any]:
    plan.save_trace(str(folder / "trace.json"), ranks)
    found: dict[str, Any] = json.loads((folder / "trace.json").read_text())
    return found


@pytest.mark.thinned(4)
@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_the_trace_of_a_step(attention: str, tmp_path: Path) -> None:
    plan = plan_of(4, attention=attention, length=4096, optimizer="adamw")
    trace = traced(plan, tmp_path)
    assert trace["otherData"]["schema_version"] == 1
    assert trace["otherData"]["mesh"] == {"cp": 4}
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    named = [e for e in events if e["ph"] == "M" and e["name"] == "process_name"]
    assert [(e["pid"], e["args"]["name"]) for e in named] == [(r, f"rank {r} (cp {r})") for r in range(4)]
    threads: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    seconds: defaultdict[tuple[int, str], float] = defaultdict(float)
    for event in events:
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            seconds[event["pid"], event["cat"]] += 1e-6 * event["dur"]
    for slices in threads.values():  # viewers drop what overlaps its neighbour
        assert all(end <= start for (_, end), (start, _) in pairwise(sorted(slices)))
    predicted = {"compute": "compute", "collective": "communication", "exposed": "exposed", "phase": "seconds"}
    for rank in range(4):
        for kind, name in predicted.items():
            assert seconds[rank, kind] == pytest.approx(plan.predicted.total(name), rel=0.01)
        levels = [e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == rank]
        assert max(levels) == int(plan.memory.total_bytes)
    names = {event["name"] for event in events}
    assert {"forward", "backward", "aten::mm", "memory"} <= names
    about = "ring_attention" if attention == "ring" else "all_to_all_single"
    assert any(name.startswith(f"spcompile::{about}/layers.0") for name in names)
    assert any(name.startswith(f"spcompile::wait for {about}/layers.") for name in names)


def test_all_forwards_of_a_broken_model_come_before_its_backwards() -> None:
    parts = [[PhaseTrace(phase, number, (), ()) for phase in ("forward", "backward")] for number in range(2)]
    found = [(phase.phase, phase.seconds) for phase in in_order_of_a_step(parts)]
    assert found == [("forward", 0), ("forward", 1), ("backward", 1), ("backward", 0)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-o", "/nowhere/at/all.json"), "no such folder"),
        (("-o", "trace.json", "--ranks", "3"), "--ranks 3"),
        (("-o", "trace.json", "--gpu", "h10"), "did you mean 'h100'"),
        (("-o", "trace.json", "--link", "wifi"), "ib"),
        ((), "--output"),
    ],
)
def test_wrong_words_of_a_timeline(
    words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spcompile, "explain", None)
    monkeypatch.setattr(sys, "argv", ["spcompile", "timeline", "models:llama-tiny", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_the_command_writes_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.json"
    words = ["models:llama-tiny", "--mesh", "cp=2", "--seq", "64", "--ranks", "1", "-o", str(file)]
    monkeypatch.setattr(sys, "argv", ["spcompile", "timeline", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    assert "1 of 2 ranks" in capsys.readouterr().out
    assert {event["pid"] for event in json.loads(file.read_text())["traceEvents"]} == {0}
