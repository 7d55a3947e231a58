"""The benchmark of memory on a GPU, but for the GPU."""

from __future__ import annotations

import json
from pathlib import Path

import memory_gpu
import pytest
import torch


@pytest.mark.thinned(9)
def test_dry_run(tmp_path: Path, one_thread: None) -> None:
    file = tmp_path / "rows.json"
    assert memory_gpu.main(["--dry-run", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["tokens"] for row in rows] == [256, 512]
    for row in rows:
        assert row["fits"]
        assert 0 < row["saved"] < row["planned"]
        assert row["measured"] == pytest.approx(row["planned"], rel=0.03)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
