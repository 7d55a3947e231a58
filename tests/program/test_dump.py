"""Dumps: what is written, what of older runs is removed, and one error where nothing can be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from example_numerics import captured
from torch import Tensor

from spcompile.diagnostics import IllegalOption, Remarks
from spcompile.machine.mesh import MeshShape
from spcompile.options import Options
from spcompile.passes import PIPELINE
from spcompile.passes_api import Context, PassReport, Stage
from spcompile.program.dump import Dump, remove_dumps
from spcompile.program.pipeline import History, Snapshot, run_passes

SNAPSHOT = Snapshot("capture", Stage.GLOBAL, "text", PassReport())


def attend(h: Tensor) -> Tensor:
    q = h.unsqueeze(1)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(1)


def started(folder: Path) -> Dump:
    dump = Dump(str(folder))
    dump.start()
    return dump


def test_dump_files(tmp_path: Path) -> None:
    gm = captured(attend, torch.randn(2, 8, 4))
    history = History(on_snapshot=started(tmp_path).snapshot, keep_texts=True)
    ctx = Context(MeshShape.of({"cp": 2}), Options(), Remarks())
    run_passes(gm, PIPELINE[1:3], ctx, history)
    (folder,) = (tmp_path / "rank0").iterdir()
    assert sorted(f.name for f in folder.iterdir()) == [
        "00-recognize-attention.txt",
        "01-recognize-mask.diff",
        "01-recognize-mask.txt",
    ]
    assert (folder / "00-recognize-attention.txt").read_text() == history.snapshots[0].text


def test_dumped_python_runs(tmp_path: Path) -> None:
    x = torch.randn(2, 8, 4)
    gm = captured(attend, x)
    dump = started(tmp_path)
    dump.python("forward", gm)
    assert dump.folder is not None
    found: dict[str, object] = {}
    exec((dump.folder / "forward.py").read_text(), found)
    forward = found["forward"]
    assert callable(forward)
    torch.testing.assert_close(forward(None, x), gm(x))


def test_no_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dump = Dump(None)
    dump.remove_older()
    dump.start()
    dump.snapshot(SNAPSHOT)
    assert dump.failure is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "rank0", "file/deeper"])
def test_a_file_in_its_place(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "dump"
    (folder / below).parent.mkdir(exist_ok=True, parents=True) if below != "file/deeper" else folder.mkdir()
    place = folder / "file" if below == "file/deeper" else folder / below
    place.write_text("")
    dump = started(folder / below if below == "file/deeper" else folder)
    dump.snapshot(SNAPSHOT)
    assert isinstance(dump.failure, IllegalOption)
    text = str(dump.failure)
    assert text.startswith(f"SP102 illegal option value: dump='{dump.given}': ")
    assert "rank" not in text.replace(str(dump.given), "")
    assert place.read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "fsync"])
def test_a_disk_that_takes_nothing(tmp_path: Path, number: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "rank0")

    monkeypatch.setattr(Path if call == "mkdir" else os, call, fails)
    dump = started(tmp_path / "dump")
    dump.snapshot(SNAPSHOT)
    assert f"dump='{tmp_path / 'dump'}': {os.strerror(number)}\n" in str(dump.failure)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_disk_that_is_full_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = started(tmp_path)
    dump.snapshot(SNAPSHOT)

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    dump.snapshot(SNAPSHOT)
    assert "No space left on device" in str(dump.failure)


def test_only_what_dumps_wrote_is_removed(tmp_path: Path) -> None:
    ours = ["rank0/graph0/00-capture.txt", "rank0/graph0/forward.py", "rank3/graph12/07-lower.diff"]
    others = ["rank0/graph1/notes.txt", "rank1/mine/00-capture.txt", "notes.txt", "ranks/graph0/00-capture.txt"]
    for name in (*ours, *others, "rank0/graph1/100-lower.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00-capture.txt").write_text("")
    (tmp_path / "rank0" / "graph9").symlink_to(elsewhere)
    remove_dumps(tmp_path)
    left = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file())
    assert left == sorted([*others, "elsewhere/00-capture.txt"])
    assert not (tmp_path / "rank3").exists()


def by_hand(x: Tensor, m: Tensor) -> Tensor:
    scores = (x @ x.mT).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ x) * m


@pytest.mark.thinned(7)
@pytest.mark.parametrize("function", [by_hand, torch.mul])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_device_dumps_too(tmp_path: Path, function: Callable[..., Tensor], compiler: str) -> None:
    """Where attention is recognised, and where the graph is compiled as it is."""
    torch._dynamo.reset()
    x = torch.randn(2, 8, 8, requires_grad=True)
    run = torch.compile(
        lambda x, m: function(x, m), backend="spcompile", options={"dump": str(tmp_path), "compiler": compiler}
    )
    run(x, torch.ones(8)).sum().backward()
    with torch.no_grad():
        run(x, torch.ones(8))
    names = [file.name for folder in sorted((tmp_path / "rank0").iterdir()) for file in sorted(folder.iterdir())]
    assert [name for name in names if name.startswith("00-")] == ["00-capture.txt"] * 2
    assert [name for name in names if name.endswith(".py")] == ["backward.py", "forward.py", "inference.py"]
    assert sum("-forward.txt" in name or "-backward.txt" in name for name in names) == 2


def test_one_device_says_what_it_cannot_write(tmp_path: Path) -> None:
    torch._dynamo.reset()
    (tmp_path / "file").write_text("")
    run = torch.compile(lambda x: x * 2, backend="spcompile", options={"dump": str(tmp_path / "file")})
    with pytest.raises(Exception, match=r"SP102 illegal option value: dump='.*file'"):
        run(torch.ones(2))
