"""The dry run of benchmarks/gpu.py: every part goes its way on CPUs, and what fails is a line that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import gpu as found

    return found


@pytest.mark.thinned(4)
def test_kernels_and_speed(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lines = gpu.run(["kernels", "speed"], gpu.Place("cpu", small=True), limit=1e9)
    assert {line.verdict for line in lines if line.part == "kernels"} == {"pass"}
    assert {line.verdict for line in lines if line.part == "speed"} == {"left out"}
    assert capsys.readouterr().out.count("PASS") == sum(line.part == "kernels" for line in lines)


def test_what_raises_is_a_line_that_failed(gpu: Any) -> None:
    def broken() -> Any:
        raise ValueError("no\nkernel")

    line = gpu.attempt("path", "something", broken)
    assert (line.verdict, line.figures) == ("fail", {"why": "ValueError: no kernel"})
    assert str(line).endswith("python benchmarks/gpu.py path")


def test_what_does_not_fit_is_left_out(gpu: Any) -> None:
    lines = gpu.run(["kernels"], gpu.Place("cpu", small=True), limit=-1.0)
    assert lines
    assert {line.verdict for line in lines} == {"left out"}


def test_without_a_gpu_nothing_is_tried(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 2


@pytest.mark.slow
@pytest.mark.thinned(25)
@pytest.mark.parametrize("part", ["path", "ranks", "share"])
def test_the_parts_that_compile(part: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), part, "--dry-run", "--seconds", "900", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["dry_run"]
    assert {line["verdict"] for line in found["lines"]} <= {"pass", "measured", "left out"}
    assert all(line["part"] == part for line in found["lines"])
