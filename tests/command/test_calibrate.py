"""`spcompile calibrate` on two gloo processes: what it measures is a file that `plan` reads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from spcompile.command import cli
from spcompile.command.calibrate_check import CheckedRow, check_text
from spcompile.command.calibrate_ranks import Sizes, calibrate_rank
from spcompile.command.train import on_processes
from spcompile.machine.measured import COLLECTIVE_NAMES, read_measured


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-o", "/nowhere/at/all.json"), "no such folder"),
        (("-o", "machine.txt"), "ends with .json"),
        (("-o", "machine.json", "--nproc", "1"), "--nproc 1"),
        ((), "--output"),
    ],
)
def test_wrong_words(
    words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["spcompile", "calibrate", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_the_worst_row_is_told() -> None:
    text = check_text([CheckedRow("a", 1.1, 1.0), CheckedRow("b", 0.7, 1.0)])
    assert "worst 30%" in text
    assert "+10%" in text


@pytest.mark.slow
@pytest.mark.thinned(6)
def test_two_processes_measure_a_machine(tmp_path: Path) -> None:
    sizes = Sizes((32, 128), (64, 256), (1 << 8, 1 << 12), (torch.float32,))
    found = on_processes(2, calibrate_rank, sizes)[0]
    file = tmp_path / "machine.json"
    file.write_text(found.to_json())
    assert read_measured(str(file)) == found
    assert found.ranks == 2
    assert set(found.collectives) == set(COLLECTIVE_NAMES)
    assert [amount for amount, _ in found.products[4].points] == [2.0 * 32**3, 2.0 * 128**3]
    assert found.collectives["all_gather"].points[0][0] == 4 * 256  # a rank sends its part to the other
